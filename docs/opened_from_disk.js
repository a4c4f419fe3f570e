// Opened from a disk, the site has no search: a browser lets no page read the index there. Say so where one would search.
if (location.protocol === "file:") {
  const reason = "Search needs a server: run mkdocs serve";
  document.querySelector(".md-search__input").placeholder = reason;
  document.querySelector(".md-search-result__meta").textContent = reason;
}
