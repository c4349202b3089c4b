"use strict";
// Whatever comes from the server (names, errors, the model's text) reaches the page through textContent and value only.

const $ = (id) => document.getElementById(id);
const make = (tag, text = "", kind = "") => {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const KEY = "lorary-key"; // in sessionStorage: this tab's, until it is closed

let base = ""; // the name of the base, as requests call it
let busy = 0; // panels that stream

// -- talking to the server ------------------------------------------------------------------------------------------

class Refused extends Error {}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  if (answer.status === 401) login(key ? "The server does not accept this key." : "");
  throw new Refused(messageOf(await answer.text()) || `the server answered ${answer.status}`);
}

function messageOf(text) {
  try {
    const { error } = JSON.parse(text);
    return error.message || String(error);
  } catch {
    return text;
  }
}

async function* events(answer) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      if (!part.startsWith("data:")) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(messageOf(data));
      yield event;
    }
  }
}

function login(why) {
  $("login-why").textContent = why;
  if (!$("login").open) $("login").showModal();
}

// -- the two sides --------------------------------------------------------------------------------------------------

class Panel {
  constructor(title) {
    const root = (this.root = $("panel").content.cloneNode(true).firstElementChild);
    const find = (selector) => root.querySelector(selector);
    this.picks = find(".picks");
    this.log = find(".log");
    this.facts = find(".facts");
    this.stopButton = find(".stop");
    this.messages = [];
    find("h3").textContent = title;
    root.setAttribute("aria-label", `Side ${title}`);
    this.picks.setAttribute("aria-label", `Adapters of side ${title}`);
    this.log.setAttribute("aria-label", `Conversation of side ${title}`);
    this.stopButton.setAttribute("aria-label", `Stop side ${title}`);
    find(".clear").setAttribute("aria-label", `Clear side ${title}`);
    find(".add").onclick = () => this.addPick().focus();
    find(".clear").onclick = () => this.clear();
    this.stopButton.onclick = () => this.stop();
    this.addPick();
    $("panels").append(root);
  }

  addPick() {
    const row = $("pick").content.cloneNode(true).firstElementChild;
    row.querySelector(".remove").onclick = () => {
      row.remove();
      (this.picks.querySelector(".name") || this.addPick()).focus();
    };
    this.picks.append(row);
    return row.querySelector(".name");
  }

  /** What the request says of its adapters: one at weight 1 is the model, any others go with the base. */
  chosen() {
    const adapters = {};
    for (const row of this.picks.children) {
      const name = row.querySelector(".name").value.trim();
      if (!name || name === base) continue;
      if (Object.hasOwn(adapters, name)) throw new Refused(`${name} is chosen twice`);
      const weight = row.querySelector(".weight").valueAsNumber;
      if (Number.isNaN(weight)) throw new Refused(`the weight of ${name} is not a number`);
      adapters[name] = weight;
    }
    const names = Object.keys(adapters);
    if (names.length === 1 && adapters[names[0]] === 1) return { model: names[0] };
    return names.length ? { model: base, adapters } : { model: base };
  }

  say(kind, text) {
    const paragraph = make("p", text, `said ${kind}`);
    this.log.append(paragraph);
    this.log.scrollTop = this.log.scrollHeight;
    return paragraph;
  }

  clear() {
    this.stop();
    this.abort = undefined; // what still comes of the answer is nobody's
    this.messages = [];
    this.log.replaceChildren();
    this.idle("");
  }

  idle(facts) {
    this.facts.textContent = facts;
    this.stopButton.disabled = true;
    this.log.setAttribute("aria-busy", "false");
  }

  stop() {
    this.abort?.abort();
  }

  async send(prompt, settings) {
    const abort = (this.abort = new AbortController());
    const messages = [...this.messages, { role: "user", content: prompt }];
    this.say("user", prompt);
    this.facts.textContent = "";
    this.log.setAttribute("aria-busy", "true"); // a screen reader reads the answer once, when it is whole
    this.stopButton.disabled = false;
    const answer = this.say("assistant", "");
    const start = performance.now();
    let first, usage, text = "", facts = "";
    try {
      const chat = settings.mode === "chat";
      const system = settings.system ? [{ role: "system", content: settings.system }] : [];
      const body = { ...this.chosen(), ...settings.sampling, stream: true, stream_options: { include_usage: true } };
      Object.assign(body, chat ? { messages: [...system, ...messages] } : { prompt });
      const response = await ask(chat ? "/v1/chat/completions" : "/v1/completions", body, abort.signal);
      for await (const event of events(response)) {
        usage = event.usage || usage;
        const choice = event.choices?.[0];
        const piece = (chat ? choice?.delta?.content : choice?.text) || "";
        if (!piece) continue;
        first ??= performance.now();
        text += piece;
        const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
        answer.textContent = text;
        if (atEnd) this.log.scrollTop = this.log.scrollHeight;
      }
      facts = factsOf(usage, first, start);
    } catch (error) {
      if (error.name === "AbortError") facts = "stopped";
      else this.say("error", error instanceof Refused ? error.message : "The server does not answer.");
    }
    if (this.abort !== abort) return; // cleared meanwhile
    if (text) this.messages = [...messages, { role: "assistant", content: text }];
    else answer.remove();
    this.idle(facts);
  }
}

function factsOf(usage, first, start) {
  const tokens = usage?.completion_tokens;
  if (first === undefined) return "an empty answer";
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? ` · ${number((tokens - 1) / seconds)} tokens/s` : "";
  return `${tokens ?? "?"} tokens · first after ${Math.round(first - start)} ms${rate}`;
}

const panels = [new Panel("A"), new Panel("B")];

function settingsOf() {
  const sampling = { max_tokens: $("max-tokens").valueAsNumber, temperature: $("temperature").valueAsNumber };
  if ($("seed").value) sampling.seed = $("seed").valueAsNumber;
  return { mode: $("mode").value, system: $("system").value, sampling };
}

$("composer").onsubmit = async (event) => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (busy || !prompt.trim()) return;
  busy = panels.length;
  $("send").disabled = true;
  $("prompt").value = "";
  await Promise.all(panels.map((panel) => panel.send(prompt, settingsOf())));
  busy = 0;
  $("send").disabled = false;
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("login").open) panels.forEach((panel) => panel.stop());
});

// -- the server's state ---------------------------------------------------------------------------------------------

const number = (value) => (value < 10 ? value.toFixed(1) : String(Math.round(value)));
const bytes = (value) => {
  const step = Math.min(4, Math.floor(Math.log2(Math.max(value, 1)) / 10));
  return `${step && value < 10 * 1024 ** step ? (value / 1024 ** step).toFixed(1) : Math.round(value / 1024 ** step)} ` +
    ["B", "KiB", "MiB", "GiB", "TiB"][step];
};
const milliseconds = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);

const rates = Array(60).fill(0);
let before, namesVersion = "";

async function look() {
  try {
    const query = new URLSearchParams({ find: $("find").value, known: namesVersion });
    show(await (await ask(`/ui/status?${query}`)).json());
    $("alert").hidden = true;
  } catch (error) {
    $("alive").textContent = "";
    if ($("login").open) return;
    $("alert").textContent = error instanceof Refused ? error.message : "The server does not answer.";
    $("alert").hidden = false;
  }
}

function show(status) {
  if (!base) {
    $("mode").value = status.chat ? "chat" : "text";
    if (status.context) $("max-tokens").value = Math.max(1, Math.min(128, Math.floor(status.context / 4)));
  }
  base = status.model;
  $("model").textContent = base;
  document.title = `${base} · lorary`;
  $("alive").textContent = status.dead ? `the engine has ended: ${status.dead}` : "serving";
  $("key-change").hidden = !sessionStorage.getItem(KEY);
  if (before) rates.push(Math.max(0, status.tokens - before.tokens) / Math.max(status.time - before.time, 0.001));
  before = status;
  if (rates.length > 60) rates.shift();
  const top = Math.max(...rates, 1);
  $("spark").firstElementChild.setAttribute("points", rates.map((r, i) => `${i},${19 - (18 * r) / top}`).join(" "));
  $("rate").textContent = number(rates.at(-1));
  $("first").textContent = status.first_token === null ? "–" : milliseconds(status.first_token);
  $("running").textContent = status.running;
  $("waiting").textContent = status.waiting;
  showBudget(status.bytes);
  showAdapters(status);
}

function showBudget({ budget, adapters, kv }) {
  $("budget").hidden = !budget;
  const parts = [make("span", `adapters ${bytes(adapters)}`, "of-adapters"), make("span", `keys and values ${bytes(kv)}`, "of-kv")];
  if (budget) {
    $("budget-adapters").style.width = `${(100 * adapters) / budget}%`;
    $("budget-kv").style.width = `${(100 * kv) / budget}%`;
    parts.push(make("span", `free ${bytes(Math.max(0, budget - adapters - kv))} of ${bytes(budget)}`, "of-rest"));
  }
  $("budget-text").replaceChildren(...parts);
}

function showAdapters({ adapters, matching, states, names, version }) {
  const counts = Object.entries(states).map(([state, count]) => `${count} ${state}`);
  $("counts").textContent = counts.join(" · ") || "none yet";
  $("adapters").replaceChildren(...adapters.map(rowOf));
  $("more").hidden = matching === adapters.length;
  $("more").textContent = `and ${matching - adapters.length} more`;
  if (names === null) return; // as they were
  namesVersion = version;
  $("names").replaceChildren(...names.map((name) => {
    const option = make("option");
    option.value = name;
    return option;
  }));
}

function rowOf(card) {
  const row = make("tr");
  const requests = card.running + card.waiting ? `${card.running} + ${card.waiting}` : "";
  const failed = card.state === "failed";
  row.append(
    make("td", card.name),
    make("td", failed && card.error ? `failed: ${card.error}` : card.state, failed ? "failed" : ""),
    make("td", requests),
    make("td", card.rank ?? "–"),
    make("td", card.bytes ? bytes(card.bytes) : "–"),
    make("td", card.form || "–"),
  );
  row.firstElementChild.replaceChildren(...card.name.split(/(?<=\/)/).flatMap((part) => [part, make("wbr")]));
  row.firstElementChild.title = card.method;
  return row;
}

$("login-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  $("login").close();
  look();
};
$("login").oncancel = (event) => event.preventDefault(); // nothing works without the key
$("key-change").onclick = () => {
  sessionStorage.removeItem(KEY);
  login("");
};
$("find").oninput = look;

(async () => {
  for (;;) {
    if (!document.hidden && !$("login").open) await look();
    await new Promise((done) => setTimeout(done, 1000));
  }
})();
$("prompt").focus();
