// The parts of the page that Gradio has not: pictures that are given, shown, painted over and kept.
// Each part fills the element of a gr.HTML, whose value is what Python sees. Texts are in mars.words.
"use strict";
(() => {
  if (window.mars) return;
  const words = window.marsWords;
  const MAX_FILE = 6_000_000, MAX_SIDE = 1536, KEPT = 120;
  const parts = {};

  const say = (name, values = {}) => words[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);

  const make = (tag, about = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(about)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "text") node.textContent = value;
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value != null) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };

  // Gradio's own fields take a value as if it were typed.
  const type = async (selector, text) => {
    const find = () => document.querySelector(`${selector} textarea, ${selector} input`);
    while (!find()) await new Promise(requestAnimationFrame);  // its tab opens
    const field = find();
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.focus();
  };

  const open = (tab) => document.getElementById(`tab-${tab}-button`)?.click();

  // A picture for a part that may not be there before its tab has been open.
  const given = {};
  const give = (name, src) => { if (parts[name]) parts[name].open(src); else given[name] = src; };
  const receives = (name, open) => {
    parts[name] = { open };
    if (given[name]) open(given[name]);
  };

  // ---- pictures that are given

  const asUrl = (blob) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(blob);
  });

  // A file as a data URL; what is large is made smaller here. PNG files that are small enough keep what they say.
  const readFile = async (file, { whole = false } = {}) => {
    if (!["image/png", "image/jpeg", "image/webp"].includes(file.type)) throw new Error(say("bad_picture"));
    const bitmap = await createImageBitmap(file).catch(() => { throw new Error(say("bad_picture")); });
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    if (file.size <= MAX_FILE && (whole || scale === 1)) return asUrl(file);
    const canvas = make("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL(file.type === "image/jpeg" ? "image/jpeg" : "image/png", 0.92);
  };

  const pictureOf = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));

  // Something that takes a picture by a button, a drop or a paste.
  const chooser = (take, { whole = false } = {}) => {
    const note = make("p", { class: "mars-note", role: "alert" });
    const input = make("input", { type: "file", accept: "image/png,image/jpeg,image/webp", hidden: true });
    const receive = async (file) => {
      note.textContent = "";
      if (!file) return;
      try { take(await readFile(file, { whole })); } catch (error) { note.textContent = error.message; }
      input.value = "";
    };
    input.addEventListener("change", () => receive(input.files[0]));
    const button = make("button", { type: "button", class: "mars-choose", onclick: () => input.click() },
      make("span", { class: "mars-choose-what", text: say("choose") }),
      make("span", { class: "mars-choose-hint", text: say("choose_hint") }));
    const listen = (zone) => {
      zone.addEventListener("dragover", (event) => { event.preventDefault(); zone.classList.add("over"); });
      zone.addEventListener("dragleave", () => zone.classList.remove("over"));
      zone.addEventListener("drop", (event) => {
        event.preventDefault(); event.stopPropagation();
        zone.classList.remove("over");
        receive(pictureOf(event.dataTransfer));
      });
      zone.addEventListener("paste", (event) => receive(pictureOf(event.clipboardData)));
    };
    return { button, input, note, listen, browse: () => input.click() };
  };

  // A picture that is described, or talked about. Its value is a data URL.
  const picture = (name) => (element, props, watch) => {
    const root = element.querySelector(".mars-picture");
    const image = make("img", { alt: "" });
    const set = (src) => { props.value = src; show(); };
    const choose = chooser(set);
    const other = make("button", { type: "button", class: "mars-small", text: say("choose_other"), onclick: choose.browse });
    const remove = make("button", { type: "button", class: "mars-small", text: say("do_remove"), onclick: () => set(null) });
    const shown = make("div", { class: "mars-given" }, image, make("div", { class: "mars-tools" }, other, remove));
    const show = () => {
      choose.button.hidden = !!props.value;
      shown.hidden = !props.value;
      if (props.value) image.src = props.value; else image.removeAttribute("src");
    };
    root.append(choose.button, choose.input, shown, choose.note);
    choose.listen(root);
    watch("value", show);
    show();
    receives(name, set);
  };

  // ---- what can be done with a picture

  const save = (src, name) => make("a", { href: src, download: `${name}.png` }).click();

  const tools = (names, get, more = {}) => {
    const acts = {
      edit: () => { open("edit"); give("painter", get().src); type("#edit-prompt", get().prompt ?? ""); },
      describe: () => { open("describe"); give("described", get().src); },
      save: () => save(get().src, `mars-${get().seed ?? "picture"}`),
      recall: () => parts.shelf.recall(get().src),
      ...more,
    };
    const buttons = names.map((name) =>
      make("button", { type: "button", class: "mars-small", "data-do": name, text: say(`do_${name}`), onclick: acts[name] }));
    return make("div", { class: "mars-tools", role: "group" }, ...buttons);
  };

  // ---- pictures that are drawn: {pictures: [{src, prompt, seed, state}, or null before its first preview]}

  const gallery = (name, cannotUpscale) => (element, props, watch, trigger) => {
    const root = element.querySelector(".mars-gallery");
    const empty = make("p", { class: "mars-empty", text: say("gallery_empty") });
    const grid = make("div", { class: "mars-grid", role: "group", "aria-label": say("gallery") });
    const why = make("p", { class: "mars-note", text: cannotUpscale });
    let chosen = 0;
    const all = () => props.value?.pictures ?? [];
    const get = () => all()[chosen] ?? all()[0];
    const bar = tools(["upscale", "edit", "describe", "recall", "save"], get, { upscale: () => trigger("upscale") });
    const up = bar.querySelector("[data-do=upscale]");
    if (cannotUpscale) { why.id = `${name}-why`; up.setAttribute("aria-describedby", why.id); }
    const choose = (index) => { chosen = index; show(); };
    const keep = () => {
      for (const one of all()) if (one?.state === "done") parts.shelf?.keep(one);
    };
    const show = () => {
      const pictures = all();
      if (chosen >= pictures.length) chosen = 0;
      while (grid.children.length > pictures.length) grid.lastChild.remove();
      pictures.forEach((one, index) => {
        let cell = grid.children[index];
        if (!cell) {
          cell = make("button", { type: "button", class: "mars-cell", onclick: () => choose(index) }, make("img"));
          grid.append(cell);
        }
        const image = cell.firstChild, done = one?.state === "done";
        const label = done ? say("picture_of", { number: index + 1, seed: one.seed }) : say("being_drawn", { number: index + 1 });
        if (one) { if (image.getAttribute("src") !== one.src) image.src = one.src; } else image.removeAttribute("src");
        image.alt = done ? one.prompt : "";
        cell.title = done ? one.prompt : "";
        cell.setAttribute("aria-label", done ? `${label}: ${one.prompt}` : label);
        cell.setAttribute("aria-pressed", String(index === chosen && pictures.length > 1));
        cell.classList.toggle("waiting", !one);
        cell.classList.toggle("preview", one?.state === "preview");
      });
      grid.dataset.count = pictures.length;
      empty.hidden = pictures.length > 0;
      bar.hidden = !pictures.length;
      why.hidden = !pictures.length || !cannotUpscale;
      const ready = get()?.state === "done";
      for (const button of bar.children) button.disabled = !ready;
      up.disabled ||= !!cannotUpscale;
    };
    root.append(empty, grid, bar, why);
    watch("value", () => { show(); keep(); });
    parts[name] = { get };
    show();
  };
  const picked = (name) => parts[name].get()?.src ?? null;

  // ---- a picture with a mask that is painted over it: {src, mask}

  const painter = (element, props, watch) => {
    const root = element.querySelector(".mars-painter");
    const image = make("img", { alt: "" });
    const canvas = make("canvas", { tabindex: 0, role: "application", "aria-label": say("mask") });
    const ring = make("div", { class: "mars-ring", "aria-hidden": "true" });
    const stage = make("div", { class: "mars-stage" }, image, canvas, ring);
    const ink = canvas.getContext("2d", { willReadFrequently: true });
    const size = make("input", { type: "range", min: 2, max: 40, value: 14, "aria-label": say("brush") });
    let erasing = false, last = null, at = { x: 0.5, y: 0.5 };

    const tell = () => {
      const { width, height } = canvas;
      const pixels = ink.getImageData(0, 0, width, height).data;
      let painted = false;
      for (let i = 3; i < pixels.length && !painted; i += 4) painted = pixels[i] > 127;
      let mask = null;
      if (painted) {
        const out = make("canvas");
        out.width = width; out.height = height;
        const page = out.getContext("2d");
        page.drawImage(canvas, 0, 0);
        page.globalCompositeOperation = "source-in";
        page.fillStyle = "white"; page.fillRect(0, 0, width, height);
        page.globalCompositeOperation = "destination-over";
        page.fillStyle = "black"; page.fillRect(0, 0, width, height);
        mask = out.toDataURL("image/png");
      }
      props.value = props.value ? { src: props.value.src, mask } : null;
    };
    const radius = () => Math.max(1, (size.value / 200) * Math.max(canvas.width, canvas.height));
    const stroke = (from, to) => {
      ink.globalCompositeOperation = erasing ? "destination-out" : "source-over";
      ink.strokeStyle = "#3355ff";  // what few pictures are
      ink.lineCap = ink.lineJoin = "round";
      ink.lineWidth = 2 * radius();
      ink.beginPath(); ink.moveTo(from.x, from.y); ink.lineTo(to.x + 0.01, to.y); ink.stroke();
    };
    const place = () => {
      const box = canvas.getBoundingClientRect(), scale = box.width / (canvas.width || 1);
      ring.style.width = ring.style.height = `${2 * radius() * scale}px`;
      ring.style.left = `${at.x * 100}%`; ring.style.top = `${at.y * 100}%`;
    };
    const pixel = () => ({ x: at.x * canvas.width, y: at.y * canvas.height });
    const follow = (event) => {
      const box = canvas.getBoundingClientRect();
      at = { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
      place();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      follow(event); last = pixel(); stroke(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      follow(event);
      if (last) { const now = pixel(); stroke(last, now); last = now; }
    });
    const lift = () => { if (last) { last = null; tell(); } };
    canvas.addEventListener("pointerup", lift);
    canvas.addEventListener("pointercancel", lift);
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = (event.shiftKey ? 4 : 1) * 0.03;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (moves[event.key]) {
        const [x, y] = moves[event.key];
        at = { x: Math.min(1, Math.max(0, at.x + x)), y: Math.min(1, Math.max(0, at.y + y)) };
      } else if (event.key === " " || event.key === "Enter") { stroke(pixel(), pixel()); tell(); }
      else if (event.key === "[") size.value = +size.value - 2;
      else if (event.key === "]") size.value = +size.value + 2;
      else return;
      event.preventDefault(); place();
    });
    size.addEventListener("input", place);
    const clear = () => { ink.clearRect(0, 0, canvas.width, canvas.height); if (props.value) tell(); };
    const mode = (name, value) => make("button", {
      type: "button", class: "mars-small", text: say(name), "aria-pressed": String(erasing === value),
      onclick: () => { erasing = value; modes.forEach(([button, is]) => button.setAttribute("aria-pressed", String(is === value))); },
    });
    const modes = [false, true].map((value) => [mode(value ? "erase" : "paint", value), value]);
    const set = (src) => {
      image.onload = () => {
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        at = { x: 0.5, y: 0.5 }; place();
      };
      image.onerror = () => { set(null); choose.note.textContent = say("bad_picture"); };
      props.value = src ? { src, mask: null } : null;
      show();
    };
    const choose = chooser(set);
    const bar = make("div", { class: "mars-tools mars-brush" }, ...modes.map(([button]) => button),
      make("label", { class: "mars-range" }, make("span", { text: say("brush") }), size),
      make("button", { type: "button", class: "mars-small", text: say("clear"), onclick: clear }),
      make("button", { type: "button", class: "mars-small", text: say("choose_other"), onclick: choose.browse }));
    const show = () => {
      const src = props.value?.src;
      choose.button.hidden = !!src;
      stage.hidden = bar.hidden = !src;
      if (!src) image.removeAttribute("src");
      else if (image.getAttribute("src") !== src) image.src = src;
    };
    root.append(choose.button, choose.input, stage, bar, choose.note);
    choose.listen(root);
    new ResizeObserver(place).observe(stage);
    watch("value", show);
    show();
    receives("painter", set);
  };

  // ---- captions in both languages: {en, zh}

  const captions = (element, props, watch) => {
    const root = element.querySelector(".mars-captions");
    const show = () => {
      const found = props.value;
      if (!found) { root.replaceChildren(make("p", { class: "mars-empty", text: say("captions_empty") })); return; }
      root.replaceChildren(...[["en", "in_english"], ["zh", "in_chinese"]].map(([language, label]) => make("div", { class: "mars-caption" },
        make("span", { class: "mars-label", text: say(label) }),
        make("p", { lang: language, text: found[language] || "…" }),
        make("button", {
          type: "button", class: "mars-small", text: say("draw_this"), disabled: !found[language],
          onclick: () => { open("draw"); type("#prompt", found[language]); },
        }))));
    };
    watch("value", show);
    show();
  };

  // ---- text and pictures in turns: [{who, text} or {who, src, state}]

  const story = (element, props, watch) => {
    const root = element.querySelector(".mars-story");
    root.setAttribute("role", "log");
    root.setAttribute("aria-label", say("story"));
    const show = () => {
      const turns = props.value ?? [];
      if (!turns.length) { root.replaceChildren(make("p", { class: "mars-empty", text: say("story_empty") })); return; }
      root.replaceChildren(...turns.map((turn) => make("div", { class: `mars-turn ${turn.who}`, "data-state": turn.state },
        turn.src ? make("img", { src: turn.src, alt: turn.prompt ?? "" }) : make("p", { text: turn.text.trim() }),
        ...(turn.state === "done" ? [tools(["edit", "recall", "save"], () => turn)] : []))));
      root.scrollTop = root.scrollHeight;
      for (const turn of turns) if (turn.state === "done") parts.shelf?.keep(turn);
    };
    watch("value", show);
    show();
  };

  // ---- pictures of before, in this browser's own store; its value is the one whose settings are wanted again

  const store = new Promise((resolve) => {
    const asked = indexedDB.open("mars", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("pictures", { keyPath: "src" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);  // a browser that keeps nothing
  });
  const inStore = async (mode, act) => {
    const found = await store;
    if (!found) return [];
    return new Promise((resolve) => {
      const asked = act(found.transaction("pictures", mode).objectStore("pictures"));
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => resolve([]);
    });
  };

  const shelf = (element, props, watch, trigger) => {
    const root = element.querySelector(".mars-shelf");
    const row = make("div", { class: "mars-row", role: "group", "aria-label": say("shelf") });
    let kept = [], chosen = null;
    const get = () => chosen;
    const remove = async () => {
      const gone = chosen;
      chosen = null; kept = kept.filter((one) => one !== gone); show();
      await inStore("readwrite", (all) => all.delete(gone.src));
    };
    const bar = tools(["recall", "edit", "describe", "save", "remove"], get, { remove });
    const recall = (src) => {
      props.value = src;
      open("draw");
      trigger("recall");
    };
    const choose = chooser(recall, { whole: true });
    const show = () => {
      row.replaceChildren(...kept.map((one) => make("button", {
        type: "button", class: "mars-thumb", title: one.prompt, "aria-label": one.prompt || say("picture_of", { number: "", seed: one.seed }),
        "aria-pressed": String(one === chosen), onclick: () => { chosen = one === chosen ? null : one; show(); },
      }, make("img", { src: one.src, alt: "", loading: "lazy" }))));
      row.hidden = !kept.length;
      bar.hidden = !chosen;
    };
    const keep = async ({ src, prompt, seed }) => {
      if (kept.some((one) => one.src === src)) return;
      const one = { src, prompt, seed, time: Date.now() };
      kept = [one, ...kept];
      const old = kept.slice(KEPT);
      kept = kept.slice(0, KEPT);
      show();
      await inStore("readwrite", (all) => all.put(one));
      for (const gone of old) await inStore("readwrite", (all) => all.delete(gone.src));
    };
    root.append(
      make("div", { class: "mars-shelf-head" }, make("h2", { text: say("shelf") }),
        make("button", { type: "button", class: "mars-small", text: say("open_png"), onclick: choose.browse })),
      make("p", { class: "mars-hint", text: say("shelf_hint") }), choose.input, choose.note, row, bar);
    window.addEventListener("dragover", (event) => event.preventDefault());
    window.addEventListener("drop", (event) => {
      event.preventDefault();
      const file = pictureOf(event.dataTransfer);
      if (file) readFile(file, { whole: true }).then(recall, (error) => { choose.note.textContent = error.message; });
    });
    parts.shelf = { keep, recall };
    inStore("readonly", (all) => all.getAll()).then((found) => {
      kept = [...kept, ...found.sort((one, other) => other.time - one.time)];
      show();
    });
    show();
  };

  // ---- small things

  const status = (element, props, watch) => {
    const line = element.querySelector(".mars-status");
    const show = () => {
      line.dataset.kind = props.value?.kind ?? "";
      line.textContent = props.value?.text ?? "";
    };
    watch("value", show);
    show();
  };

  const examples = (texts) => (element) => {
    const root = element.querySelector(".mars-examples");
    root.setAttribute("aria-label", say("examples"));
    root.append(...texts.map((text) => make("button", {
      type: "button", class: "mars-chip", text, onclick: () => type("#prompt", text),
    })));
  };

  const themed = () => document.body.classList.toggle("dark",
    (localStorage.getItem("mars-theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark");
  const header = (element) => {
    element.querySelector(".mars-theme").addEventListener("click", () => {
      localStorage.setItem("mars-theme", document.body.classList.contains("dark") ? "light" : "dark");
      themed();
    });
    element.querySelector(".mars-language").addEventListener("click", (event) => {
      document.cookie = `mars_language=${event.currentTarget.lang}; path=/; max-age=31536000; SameSite=Lax`;
    });
    themed();
  };

  const visible = (selector) => [...document.querySelectorAll(selector)].find((node) => node.offsetParent !== null);
  window.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); visible(".mars-go")?.click(); }
    if (event.key === "Escape") visible(".mars-stop")?.click();
  });

  window.mars = { gallery, picked, picture, painter, captions, story, shelf, status, examples, header };
})();
