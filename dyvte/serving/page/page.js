"use strict";
/* The page: images in, questions to the server, turns out; and a saved page that needs no server. */

(function () {
  const byId = (id) => document.getElementById(id);
  const state = { settings: null, turns: [], images: [] };
  let views = [];
  let busy = false;

  /* --- looks --- */

  function theme(name) {
    document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem("dyvte-theme", name);
    } catch {
      /* a saved page, or storage that is switched off: it holds for this visit */
    }
  }

  function startTheme() {
    let stored = null;
    try {
      stored = localStorage.getItem("dyvte-theme");
    } catch {
      stored = null;
    }
    if (stored === "light" || stored === "dark") {
      document.documentElement.dataset.theme = stored;
    }
    byId("theme").addEventListener("click", () => {
      const now = document.documentElement.dataset.theme;
      const dark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      theme(dark ? "light" : "dark");
    });
  }

  function say(text) {
    byId("status").textContent = text;
  }

  /* --- images --- */

  function takeFiles(files) {
    for (const file of files) {
      if (!file.type.startsWith("image/")) {
        say(`${file.name} is no image`);
        continue;
      }
      const reader = new FileReader();
      reader.addEventListener("load", () => {
        state.images.push({ url: reader.result, name: file.name || "pasted image" });
        drawImages();
      });
      reader.addEventListener("error", () => say(`${file.name} cannot be read`));
      reader.readAsDataURL(file);
    }
  }

  function drawImages() {
    byId("images").replaceChildren(
      ...state.images.map((image, at) =>
        dyvte.make(
          "li",
          {},
          dyvte.make("img", { src: image.url, alt: `To be asked about: ${image.name}` }),
          dyvte.make(
            "button",
            {
              type: "button",
              "aria-label": `Remove ${image.name}`,
              onclick: () => {
                state.images.splice(at, 1);
                drawImages();
              },
            },
            "×",
          ),
        ),
      ),
    );
    if (state.images.length > 0) {
      say("");
      byId("question").focus();
    }
  }

  function startImages() {
    const drop = byId("drop");
    byId("file").addEventListener("change", (event) => {
      takeFiles(event.target.files);
      event.target.value = "";
    });
    for (const kind of ["dragenter", "dragover"]) {
      document.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.classList.add("over");
      });
    }
    for (const kind of ["dragleave", "drop"]) {
      document.addEventListener(kind, (event) => {
        event.preventDefault();
        if (kind === "drop" || event.relatedTarget === null) {
          drop.classList.remove("over");
        }
      });
    }
    document.addEventListener("drop", (event) => takeFiles(event.dataTransfer.files));
    document.addEventListener("paste", (event) => takeFiles(event.clipboardData.files));
  }

  /* --- the server --- */

  async function failure(reply) {
    try {
      return (await reply.json()).error.message;
    } catch {
      return `the server answered with status ${reply.status}`;
    }
  }

  function post(path, body) {
    return fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  }

  /* Chunks of a streamed answer, each parsed. */
  async function* chunks(reply) {
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const text = part.replace(/^data: /, "");
        if (text !== "[DONE]") {
          yield JSON.parse(text);
        }
      }
    }
  }

  /* The conversation up to a turn; what the third column answered is what was said. */
  function messages(turn) {
    const said = [];
    for (const one of state.turns) {
      const images = one.images.map((url) => ({ type: "image_url", image_url: { url } }));
      said.push({ role: "user", content: [...images, { type: "text", text: one.question }] });
      if (one === turn) {
        return said;
      }
      if (one.error === null) {
        said.push({ role: "assistant", content: one.columns.own.text || "(nothing)" });
      } else {
        said.pop();
      }
    }
    return said;
  }

  async function fill(view, name, wish) {
    const column = view.turn.columns[name];
    column.state = "busy";
    column.text = "";
    view.drawColumns();
    // Each column pays for its image, or only the first one's time would be that of a fresh image.
    const reply = await post("/v1/chat/completions", { messages: messages(view.turn), stream: true, visual_exit: { ...wish, share_images: false } });
    if (!reply.ok) {
      throw new Error(await failure(reply));
    }
    for await (const chunk of chunks(reply)) {
      if (chunk.error) {
        throw new Error(chunk.error.message);
      }
      if (chunk.visual_exit) {
        column.report = chunk.visual_exit;
        column.schedule = chunk.visual_exit.schedule;
        column.firstToken = chunk.timings.first_token_ms;
      }
      column.text += chunk.choices[0]?.delta.content || "";
      view.drawColumns();
    }
    column.state = "done";
    view.drawColumns();
  }

  async function trace(view) {
    const turn = view.turn;
    if (!turn.columns.full.report || turn.columns.full.report.exit_layer < 0) {
      return;
    }
    turn.tracing = "busy";
    view.drawExits();
    const reply = await post("/v1/visual_exit/schedules", { messages: messages(turn) });
    if (!reply.ok) {
      turn.tracing = "failed";
      throw new Error(await failure(reply));
    }
    turn.traced = await reply.json();
    const threshold = turn.columns.own.report.threshold;
    turn.level = threshold === null ? null : dyvte.levelOf(threshold);
    view.drawExits();
    view.drawColumns();
  }

  /* Gates that also freeze: the server follows the threshold, at most one request at a time. */
  let asked = null;
  async function followThreshold(view, value) {
    const isBusy = asked !== null;
    asked = { view, value };
    if (isBusy) {
      return;
    }
    while (asked !== null) {
      const { view: now, value: at } = asked;
      try {
        await fill(now, "own", { threshold: at });
        now.drawExits();
      } catch (error) {
        say(error.message);
      }
      asked = asked.value === at ? null : asked;
    }
  }

  /* --- asking --- */

  function schedules() {
    const exit = Number(byId("exit").value);
    const freeze = Math.min(Number(byId("freeze").value), exit);
    return {
      full: "never",
      fixed: freeze === exit ? `fixed:${exit}` : `freeze:${freeze}:${exit}`,
      own: byId("own").value.trim(),
    };
  }

  function wishOf(text) {
    const threshold = /^gates@([\d.]+)$/.exec(text);
    return threshold ? { threshold: Number(threshold[1]) } : { policy: text };
  }

  async function ask(question) {
    const wanted = schedules();
    const turn = dyvte.newTurn(question, state.images.map((image) => image.url), wanted);
    state.turns.push(turn);
    const view = addView(turn);
    const images = state.images;
    state.images = [];
    drawImages();
    try {
      for (const name of dyvte.COLUMNS) {
        say(`asking: ${wanted[name]}`);
        await fill(view, name, wishOf(wanted[name]));
      }
      say("looking at every schedule");
      await trace(view);
      say("");
    } catch (error) {
      turn.error = error.message;
      say("");
      view.draw();
      // What could not be asked does not stay in the conversation.
      if (!turn.columns.own.report) {
        state.turns.splice(state.turns.indexOf(turn), 1);
        state.images = images;
        drawImages();
      }
    }
  }

  function addView(turn) {
    const view = new dyvte.TurnView(turn, state.settings, followThreshold);
    views.push(view);
    byId("turns").prepend(view.element);
    return view;
  }

  function startForm() {
    const form = byId("form");
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const question = byId("question").value.trim();
      if (busy || !question) {
        return;
      }
      setBusy(true);
      await ask(question);
      setBusy(false);
      byId("question").value = "";
      byId("question").focus();
    });
    byId("new").addEventListener("click", () => {
      state.turns = [];
      state.images = [];
      views = [];
      byId("turns").replaceChildren();
      drawImages();
      setBusy(false);
    });
    byId("save").addEventListener("click", save);
  }

  function setBusy(value) {
    busy = value;
    byId("ask").disabled = value;
    byId("new").disabled = value || state.turns.length === 0;
    byId("save").disabled = value || state.turns.length === 0;
  }

  function takeSettings(settings) {
    state.settings = settings;
    byId("about").textContent = `${settings.model}, ${settings.num_layers} layers`;
    for (const id of ["freeze", "exit"]) {
      byId(id).max = settings.num_layers;
      byId(id).value = Math.ceil(settings.num_layers / 2);
    }
    byId("own").value = settings.gates ? "gates" : settings.policy;
    setBusy(false);
  }

  /* --- a saved page: the same scripts and styles, and the turns, in one file --- */

  async function save() {
    // The end of a script element inside a script would end it.
    const text = async (path) => (await (await fetch(path)).text()).replace(/<\/(script|style)/g, "<\\/$1");
    const scripts = [...document.querySelectorAll("script[src]")].map((one) => one.getAttribute("src"));
    const content = JSON.stringify({ settings: state.settings, turns: state.turns }).replace(/</g, "\\u003c");
    const page = [
      "<!doctype html>",
      `<html lang="en"><head><meta charset="utf-8">`,
      `<meta name="viewport" content="width=device-width, initial-scale=1">`,
      `<meta name="color-scheme" content="light dark"><title>dyvte: a saved page</title>`,
      `<style>${await text("/page/page.css")}</style></head><body class="saved">`,
      `<header><h1>dyvte</h1><p id="about"></p><div class="buttons">`,
      `<button type="button" id="theme" aria-label="Change between light and dark">◐</button></div></header>`,
      `<main><div id="turns"></div></main>`,
      `<script type="application/json" id="saved">${content}</script>`,
      ...(await Promise.all(scripts.map(async (path) => `<script>${await text(path)}</script>`))),
      "</body></html>",
    ].join("\n");
    const link = dyvte.make("a", {
      href: URL.createObjectURL(new Blob([page], { type: "text/html" })),
      download: "dyvte.html",
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function openSaved(element) {
    const { settings, turns } = JSON.parse(element.textContent);
    Object.assign(state, { settings, turns });
    byId("about").textContent = `${settings.model}, ${settings.num_layers} layers; saved, without a server`;
    turns.forEach(addView);
  }

  startTheme();
  const saved = byId("saved");
  if (saved) {
    openSaved(saved);
  } else {
    startImages();
    startForm();
    fetch("/v1/visual_exit")
      .then((reply) => reply.json())
      .then(takeSettings)
      .catch(() => say("the server cannot be reached"));
  }
})();
