// The index of the search, a megabyte, is asked for when somebody turns to the search, not with every page.
(() => {
  const { open, send } = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.open = function (method, address, ...rest) {
    this.isIndex = /\/search_index\.json$/.test(address);
    return open.call(this, method, address, ...rest);
  };
  XMLHttpRequest.prototype.send = function (body) {
    const found = new URLSearchParams(location.search).has("h");  // a result was opened: its words are marked
    if (!this.isIndex || found) return send.call(this, body);
    const turned = new AbortController(), once = { signal: turned.signal };
    const ask = event => {
      if (!event.target.closest?.("#__search, .md-search")) return;
      turned.abort();
      send.call(this, body);
    };
    document.addEventListener("focusin", ask, once);
    document.addEventListener("change", ask, once);
  };
})();
