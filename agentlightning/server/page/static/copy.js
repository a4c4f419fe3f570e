// Copy the text of a template, or the ids of tokens, and say so.
const copied = document.getElementById("copied");

function contentOf(source) {
  if (source instanceof HTMLTemplateElement) return source.content.textContent;
  return `[${[...source.getElementsByClassName("t")].map((token) => token.dataset.t.split(" ")[0]).join(", ")}]`;
}

async function copy(text) {
  // Browsers have a clipboard for scripts only over HTTPS and for their own machine.
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const text = contentOf(document.getElementById(button.dataset.copy));
    copied.textContent = await copy(text).then(
      () => `Copied ${text.length} characters`,
      () => "The browser does not let this page copy",
    );
    button.focus();
  });
}
