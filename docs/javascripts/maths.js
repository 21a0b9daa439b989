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
  // No line begins with the comma behind a formula: it goes into the formula's last part, which is never broken.
  for (const formula of document.querySelectorAll("article span > .katex")) {
    const after = formula.parentNode.nextSibling, last = formula.querySelector(".katex-html > .base:last-child");
    const sign = after?.nodeType === Node.TEXT_NODE && /^[.,;:!?)]+/.exec(after.data)?.[0];
    if (!sign || !last) continue;
    last.append(sign);
    after.data = after.data.slice(sign.length);
  }
  document.documentElement.dataset.maths = "drawn";
});
