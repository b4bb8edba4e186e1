// The page's script: what a mark says beside the pointer, arrow keys from mark to mark, the
// alternatives of a layer, the architecture of a point of the frontier. The page reads without it.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const source = document.getElementById("data");
  const data = source ? JSON.parse(source.textContent) : {};
  const make = (name, text, parent) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };

  function show(mark) {
    tip.textContent = mark.getAttribute("aria-label");
    tip.style.display = "block";
    const box = mark.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${scrollX + Math.max(8, Math.min(left, most))}px`;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.top = `${scrollY + (above > 0 ? above : box.bottom + 8)}px`;
  }
  const hide = () => { tip.style.display = "none"; };

  function choose(mark) {
    if (mark.dataset.layer !== undefined && data.layers) layer(Number(mark.dataset.layer));
    if (mark.dataset.solution !== undefined && data.frontier) solution(mark.dataset.solution);
    for (const other of mark.closest("svg").querySelectorAll(".mark.on")) other.classList.remove("on");
    if (mark.dataset.layer !== undefined || mark.dataset.solution !== undefined) mark.classList.add("on");
  }

  function table(head, rows, parent, label) {
    const around = make("div", undefined, parent);
    around.className = "scroll";
    around.tabIndex = 0;
    around.setAttribute("role", "region");
    around.setAttribute("aria-label", label);
    const element = make("table", undefined, around);
    const top = make("tr", undefined, make("thead", undefined, element));
    for (const word of head) make("th", word, top).scope = "col";
    const body = make("tbody", undefined, element);
    for (const row of rows) {
      const line = make("tr", undefined, body);
      if (row.chosen) line.className = "chosen";
      row.cells.forEach((cell, i) => { make(i ? "td" : "th", cell, line); });
    }
  }

  function layer(index) {
    const panel = document.getElementById("layer");
    if (!panel) return;
    const at = data.layers[index];
    panel.replaceChildren();
    make("h3", `Layer ${index}: ${at.chosen}`, panel);
    const says = (name) => name + (name === at.chosen ? " (chosen)" : "") + (name === at.parent ? " (the parent's)" : "");
    table(
      ["block", "KL alone, nats", "of the parent's time", "parameters"],
      at.rows.map(([name, kl, share, size]) => ({
        chosen: name === at.chosen,
        cells: [says(name), kl.toFixed(4), `${Math.round(100 * share)} %`, size.toLocaleString("en")],
      })), panel, `blocks of layer ${index}`);
    if (at.left_out) make("p", `${at.left_out} more lose more quality and take no less time than one of these.`, panel).className = "soft";
  }

  function solution(number) {
    const panel = document.getElementById("solution");
    if (!panel) return;
    const at = data.frontier[number];
    panel.replaceChildren();
    make("h3", `Solution ${number}: ${at.speedup.toFixed(2)}x predicted`, panel);
    make("p", `Sum of scores ${at.objective.toFixed(4)}, ${at.parameters.toLocaleString("en")} parameters.`, panel);
    make("pre", at.blocks.map((block, i) => `${i}: ${block}`).join("   "), panel);
    const line = make("p", undefined, panel);
    make("code", at.command, line);
    line.append(" ");
    const button = make("button", "Copy the command", line);
    button.type = "button";
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(at.command); } catch {
        const range = document.createRange();  // a page opened as a file may not use the clipboard
        range.selectNodeContents(line.querySelector("code"));
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
    });
  }

  for (const chart of document.querySelectorAll("svg.chart")) {
    const marks = [...chart.querySelectorAll(".mark")];
    marks.forEach((mark, i) => {
      mark.setAttribute("tabindex", i ? "-1" : "0");  // one stop for each chart
      mark.querySelector("title")?.remove();  // the tip says it
      mark.addEventListener("pointerenter", () => { show(mark); });
      mark.addEventListener("pointerleave", hide);
      mark.addEventListener("blur", hide);
      mark.addEventListener("focus", () => { show(mark); choose(mark); });
      mark.addEventListener("click", () => { show(mark); choose(mark); mark.focus(); });
      if (mark.dataset.layer !== undefined || mark.dataset.solution !== undefined) {
        mark.addEventListener("pointerenter", () => { choose(mark); });
      }
      mark.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const to = event.key === "Home" ? 0 : event.key === "End" ? marks.length - 1 : i + (step ?? 0);
        if (event.key === "Escape") hide();
        if (to === i || !marks[to]) return;
        event.preventDefault();
        mark.setAttribute("tabindex", "-1");
        marks[to].setAttribute("tabindex", "0");
        marks[to].focus();
      });
    });
  }
  if (data.layers) {
    const changed = data.layers.findIndex((at) => at.chosen !== at.parent);
    layer(Math.max(0, changed));
  }
  if (data.frontier) solution("0");
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
