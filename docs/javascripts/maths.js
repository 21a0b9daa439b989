// Settings of MathJax: what notebooks ($...$) and Markdown pages (\(...\)) mean by maths.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], displayMath: [["$$", "$$"], ["\\[", "\\]"]], processEscapes: true, tags: "ams" },
  options: { skipHtmlTags: ["script", "noscript", "style", "textarea", "pre", "code"], enableMenu: false },
  svg: { fontCache: "global" },
};
