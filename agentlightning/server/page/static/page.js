// Says so where the store does not answer: what is shown then is what it was.
const trouble = document.getElementById("trouble");
for (const name of ["htmx:error", "htmx:response:error"]) {
  document.addEventListener(name, () => {
    trouble.textContent ||= `The store does not answer: this is how it was at ${new Date().toLocaleTimeString()}`;
  });
}
document.addEventListener("htmx:after:swap", () => {
  trouble.textContent = "";
});
