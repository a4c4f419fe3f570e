// Opened from a disk, the site has no search: a browser lets no page read the index there, and the theme hides the field.
if (location.protocol === "file:") {
  const reason = document.createElement("p");
  reason.textContent = "Search needs a server: run mkdocs serve";
  reason.style.cssText = "font-size: .7rem; margin: 0 .4rem";
  document.querySelector(".md-header__inner").append(reason);
}
