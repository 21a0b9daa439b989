// What notebooks ($...$) and Markdown pages (\(...\)) mean by maths, drawn by KaTeX.
document.addEventListener("DOMContentLoaded", () => {
  renderMathInElement(document.querySelector("article"), {
    delimiters: [
      { left: "$$", right: "$$", display: true }, { left: "\\[", right: "\\]", display: true },
      { left: "$", right: "$", display: false }, { left: "\\(", right: "\\)", display: false },
    ],
    ignoredTags: ["script", "noscript", "style", "textarea", "pre", "code", "option", "svg"],
    ignoredClasses: ["laid-view"],
    throwOnError: false,
  });
  document.documentElement.dataset.maths = "drawn";
});
