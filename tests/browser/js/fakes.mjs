// A page's globals under a clock of our own, and a server with a real log behind a fake EventSource and fetch.
import assert from "node:assert/strict";

const immediate = setImmediate;
const drain = () => new Promise((resolve) => immediate(resolve));

/** A seeded source of numbers (mulberry32), so that a failing trial can be run again. */
export const seeded = (seed) => () => {
  seed = (seed + 0x6d2b79f5) | 0;
  let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
};

/** What a browser gives a page, with time that passes only in `pass` and `sleep`. */
export class Page {
  #saved = new Map();
  #timers = new Map();
  #count = 0;
  #frames = [];
  #events = new EventTarget();
  now = 1_000_000;
  /** By how much the computer's clock is wrong. */
  wrong = 0;
  /** How long the computer slept: in many, `performance.now()` stands still meanwhile. */
  #slept = 0;
  frame = 0;
  reported = [];
  /** What was warned of, in order. */
  warned = [];
  #channels = new Set();

  constructor({ seed = 1, dom = true } = {}) {
    const random = seeded(seed);
    this.document = { visibilityState: "visible", hidden: false, baseURI: "http://page.test/chat/?a=1#b" };
    const fakes = {
      setTimeout: (fn, ms = 0, ...args) => this.#timer(fn, ms, args),
      setInterval: (fn, ms, ...args) => this.#timer(fn, ms, args, ms),
      clearTimeout: (id) => void this.#timers.delete(id),
      clearInterval: (id) => void this.#timers.delete(id),
      reportError: (error) => this.reported.push(error),
      navigator: { onLine: true },
    };
    const page = this;
    if (dom)
      Object.assign(fakes, {
        document: this.document,
        BroadcastChannel: class {
          constructor(name) {
            this.name = name;
            page.#channels.add(this);
          }
          postMessage(data) {
            assert.ok(page.#channels.has(this), "a message on a closed channel");
            for (const other of page.#channels)
              if (other !== this && other.name === this.name)
                page.#timer(() => page.#channels.has(other) && other.onmessage?.({ data: copy(data) }), 1, []);
          }
          close() {
            page.#channels.delete(this);
          }
        },
        requestAnimationFrame: (fn) => {
          this.#frames.push(fn);
          if (this.#frames.length === 1) this.#tickFrame();
          return 1;
        },
        addEventListener: (...args) => this.#events.addEventListener(...args),
      });
    for (const [name, value] of Object.entries(fakes)) {
      this.#saved.set(name, Object.getOwnPropertyDescriptor(globalThis, name));
      Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
    }
    const { random: wasRandom } = Math;
    const { now: wasNow } = Date;
    const { now: wasTicks } = performance;
    const { warn: wasWarn } = console;
    console.warn = (text) => this.warned.push(text);
    Math.random = random;
    const { getRandomValues: wasValues } = crypto;
    const draw = seeded(seed + 0.5);
    crypto.getRandomValues = (array) => array.map(() => draw() * 2 ** 32);
    Date.now = () => this.now + this.wrong;
    performance.now = () => this.now - this.#slept;
    this.close = () => {
      Math.random = wasRandom;
      crypto.getRandomValues = wasValues;
      Date.now = wasNow;
      console.warn = wasWarn;
      performance.now = wasTicks;
      for (const [name, was] of this.#saved)
        if (was) Object.defineProperty(globalThis, name, was);
        else delete globalThis[name];
    };
  }

  #timer(fn, ms, args, every) {
    const id = ++this.#count;
    this.#timers.set(id, { id, at: this.now + Math.max(ms, 0), fn: () => fn(...args), every });
    return id;
  }

  #tickFrame() {
    this.#timer(() => {
      if (this.document.hidden) return;
      this.frame++;
      const frames = this.#frames.splice(0);
      for (const fn of frames) fn(this.now);
    }, 16 - (this.now % 16), []);
  }

  /** How many timers are left. */
  get timers() {
    return this.#timers.size;
  }

  /** How many channels are open. */
  get channels() {
    return this.#channels.size;
  }

  fire(type, about = {}) {
    this.#events.dispatchEvent(Object.assign(new Event(type), about));
  }

  hide(hidden) {
    this.document.hidden = hidden;
    this.document.visibilityState = hidden ? "hidden" : "visible";
    this.fire("visibilitychange");
    if (!hidden && this.#frames.length) this.#tickFrame();
  }

  async pass(ms = 0) {
    const end = this.now + ms;
    await drain();
    for (;;) {
      let next;
      for (const timer of this.#timers.values())
        if (timer.at <= end && (!next || timer.at < next.at)) next = timer;
      if (!next) break;
      this.now = Math.max(this.now, next.at);
      if (next.every) next.at += next.every;
      else this.#timers.delete(next.id);
      next.fn();
      await drain();
    }
    this.now = end;
  }

  /** Time passes without a timer running, as while a laptop sleeps. */
  sleep(ms) {
    this.now += ms;
    this.#slept += ms;
    for (const timer of this.#timers.values()) timer.at += ms;
  }
}

export const freeze = (value) => {
  if (value && typeof value === "object" && !Object.isFrozen(value)) {
    Object.freeze(value);
    Object.values(value).forEach(freeze);
  }
  return value;
};

/** A `set` that holds every call to the rules. */
export const recorder = (page, { onePerFrame = true } = {}) => {
  const calls = [];
  let frame = -1, at = 0;
  const set = (entries) => {
    assert.ok(Array.isArray(entries));
    const last = calls.at(-1);
    if (last && !set.fresh && !set.loose) {
      assert.ok(last.length !== entries.length || entries.some((e, i) => e !== last[i]), "set without a change");
      const known = new Map(last.map((entry) => [entry.message.id, entry]));
      for (const entry of entries) {
        const was = known.get(entry.message.id);
        if (was && was !== entry) assert.notDeepEqual(was, entry, "an unchanged entry is another object");
      }
      if (onePerFrame && !page.document.hidden) assert.ok(frame !== page.frame || page.now - at >= 200, "two calls in one frame");
    }
    assert.ok(!calls.includes(entries), "the same array twice");
    assert.equal(new Set(entries.map((entry) => entry.message.id)).size, entries.length, "an entry twice");
    set.fresh = false;
    frame = page.frame;
    at = page.now;
    calls.push(freeze(entries));
  };
  set.calls = calls;
  // A new subscription starts anew; `loose`: every call may be another's.
  set.fresh = true;
  Object.defineProperty(set, "last", { get: () => calls.at(-1) });
  return set;
};

const copy = (value) => JSON.parse(JSON.stringify(value));
const over = ({ status }) => ["completed", "incomplete", "failed", "cancelled", "expired"].includes(status);

export class Server {
  threads = new Map();
  sources = new Set();
  requests = [];
  /** How long a request or an event is under way. */
  delay = () => 5;
  /** (request) => undefined | "refuse" | "lose" (the answer) | status | [status, headers, body] */
  fault = () => undefined;
  /** (source) => true when the stream can't be opened */
  failOpen = () => false;
  /** () => undefined | "skip" | "repeat" (an event) | "mute" (the stream dies and nobody is told) */
  twist = () => undefined;
  /** () => true when a proxy holds back all that is sent on a new stream */
  holds = () => false;
  page = 50;
  epochs = 0;
  ids = 0;
  assistants = [{ id: "tutor", name: "Tutor", description: "Explains." }];
  /** By call id: what a call needs, who executes it until when, how often another was given it, how it was answered. */
  needs = new Map();
  claims = new Map();
  grants = new Map();
  decisions = new Map();
  #answers = new Map();

  constructor() {
    const server = this;
    this.EventSource = class extends EventTarget {
      readyState = 0;
      constructor(url) {
        super();
        this.url = url;
        server.#connect(this);
      }
      close() {
        this.readyState = 2;
        server.sources.delete(this);
      }
    };
  }

  thread(id) {
    const thread = { id, epoch: `e${++this.epochs}`, offset: 0, log: [], entries: [] };
    this.threads.set(id, thread);
    return thread;
  }

  place({ epoch, offset }) {
    return `${epoch}-${offset}`;
  }

  // ---- what the server does

  emit(thread, name, data) {
    thread.log.push({ offset: ++thread.offset, name: `thread.${name}`, data: JSON.stringify(data) });
    for (const source of this.sources) if (source.thread === thread) this.#pump(source);
  }

  message(thread, role, more) {
    const id = `msg_${++this.ids}`;
    return {
      id, object: "thread.message", created_at: 1, thread_id: thread.id, role, status: "completed", content: [],
      assistant_id: null, run_id: null, completed_at: 1, incomplete_at: null, incomplete_details: null,
      metadata: {}, ...more,
    };
  }

  say(thread, content) {
    const message = this.message(thread, "user", { content: [{ type: "text", text: { value: content, annotations: [] } }] });
    const entry = { assistant_id: null, message, run: null, steps: [] };
    thread.entries.push(entry);
    this.emit(thread, "message.created", message);
    return entry;
  }

  start(thread, assistant_id) {
    const id = `run_${++this.ids}`;
    const message = this.message(thread, "assistant", { status: "in_progress", completed_at: null, assistant_id, run_id: id });
    const run = {
      id, object: "thread.run", thread_id: thread.id, assistant_id, message_id: message.id, status: "queued",
      required_action: null, expires_at: null, last_error: null, usage: null, metadata: {},
    };
    const entry = { assistant_id, message, run, steps: [] };
    thread.entries.push(entry);
    this.emit(thread, "run.created", run);
    this.emit(thread, "run.queued", run);
    this.emit(thread, "message.created", message);
    return entry;
  }

  begin(thread, { run }) {
    run.status = "in_progress";
    this.emit(thread, "run.in_progress", run);
  }

  delta(thread, { message }, value, type = "text") {
    const last = message.content.length - 1;
    const index = message.content[last]?.type === type ? last : last + 1;
    const part = (message.content[index] ??=
      type === "text" ? { type, text: { value: "", annotations: [] } } : { type, refusal: "" });
    if (type === "text") part.text.value += value;
    else part.refusal += value;
    this.emit(thread, "message.delta", {
      id: message.id, object: "thread.message.delta",
      delta: { content: [{ index, type, [type]: type === "text" ? { value } : value }] },
    });
  }

  annotate(thread, { message }, annotation) {
    message.content[0].text.annotations.push(annotation);
    this.emit(thread, "message.delta", {
      id: message.id,
      delta: { content: [{ index: 0, type: "text", text: { annotations: [annotation] } }] },
    });
  }

  /** The open step of a kind, a new one where there is none. */
  #step(thread, { message, run, steps }, details) {
    const last = steps.at(-1);
    if (last?.type === details.type && last.status === "in_progress") return last;
    const step = { id: `step_${++this.ids}`, object: "thread.run.step", run_id: run.id, thread_id: thread.id,
      assistant_id: run.assistant_id, type: details.type, status: "in_progress", created_at: 1, completed_at: null,
      content_index: message.content.length, step_details: details };
    steps.push(step);
    this.emit(thread, "run.step.created", step);
    return step;
  }

  think(thread, entry, text) {
    const { run } = entry;
    const step = this.#step(thread, entry, { type: "reasoning", reasoning: { text: "" } });
    step.step_details.reasoning.text += text;
    this.emit(thread, "run.step.delta", {
      id: step.id, object: "thread.run.step.delta", run_id: run.id,
      delta: { step_details: { type: "reasoning", reasoning: { text } } },
    });
  }

  /** The model calls a tool; its arguments are still to come. Gives the call's id. */
  call(thread, entry, name, kind = "server") {
    const step = this.#step(thread, entry, { type: "tool_calls", tool_calls: [] });
    const calls = step.step_details.tool_calls;
    const call = { id: `call_${++this.ids}`, type: "function", function: { name, arguments: "", output: null },
      status: "in_progress", kind, error: null, started_at: null, completed_at: null };
    calls.push(call);
    this.#tell(thread, step, { index: calls.length - 1, ...call });
    return call.id;
  }

  /** A call's arguments grow; all else that is new takes the place of what was there. */
  grow(thread, { steps }, id, { arguments: value, output, ...more }) {
    for (const step of steps) {
      const index = step.step_details.tool_calls?.findIndex((call) => call.id === id) ?? -1;
      if (index < 0) continue;
      const call = step.step_details.tool_calls[index];
      const fresh = {};
      if (value !== undefined) call.function.arguments += fresh.arguments = value;
      if (output !== undefined) call.function.output = fresh.output = output;
      Object.assign(call, more);
      this.#tell(thread, step, { index, ...more, ...(Object.keys(fresh).length && { function: fresh }) });
    }
  }

  #tell(thread, { id, run_id }, call) {
    this.emit(thread, "run.step.delta", {
      id, object: "thread.run.step.delta", run_id,
      delta: { step_details: { type: "tool_calls", tool_calls: [call] } },
    });
  }

  /** The run waits: `needs` says of each call whether for an output or an approval. */
  require(thread, entry, needs) {
    for (const [id, what] of Object.entries(needs)) {
      this.needs.set(id, what);
      this.grow(thread, entry, id, { status: "requires_action" });
    }
    entry.run.expires_at = 9;
    this.#wait(thread, entry);
  }

  /** The run tells what it waits for, or goes on. */
  #wait(thread, { run, steps }) {
    const waiting = steps.flatMap(({ step_details }) => step_details.tool_calls ?? [])
      .filter(({ status }) => status === "requires_action");
    const tool_calls = waiting.map(({ id, type, function: { name, arguments: given } }) =>
      ({ id, type, function: { name, arguments: given }, needs: this.needs.get(id) }));
    run.status = waiting.length ? "requires_action" : "queued";
    run.required_action = waiting.length ? { type: "submit_tool_outputs", submit_tool_outputs: { tool_calls } } : null;
    if (!waiting.length) run.expires_at = null;
    this.emit(thread, `run.${run.status}`, run);
  }

  #refused(status, code, more = {}) {
    return [status, { error: { type: "invalid_request_error", code, message: `No: ${code}.`, ...more } }];
  }

  /** Why a call cannot be given such an answer. */
  #refusal(entry, id, needs) {
    const call = entry.steps.flatMap(({ step_details }) => step_details.tool_calls ?? []).find((one) => one.id === id);
    if (!call) return this.#refused(404, "tool_call_not_found");
    if (this.decisions.has(id)) return this.#refused(409, "already_answered", { decision: this.decisions.get(id) });
    if (call.status !== "requires_action" || this.needs.get(id) !== needs) return this.#refused(409, "not_waiting");
  }

  /** Answers calls, all or none. */
  answer(thread, entry, needs, answers) {
    for (const { tool_call_id } of answers) {
      const refusal = this.#refusal(entry, tool_call_id, needs);
      if (refusal) return refusal;
    }
    for (const { tool_call_id, output, approve, reason, arguments: given } of answers) {
      this.decisions.set(tool_call_id, { needs, at: 1, ...(needs === "approval" && { approve, reason }) });
      if (needs === "output") this.grow(thread, entry, tool_call_id, { status: "completed", output });
      else if (!approve) this.grow(thread, entry, tool_call_id, { status: "denied", output: "Denied.", error: "denied" });
      else {
        if (given) this.#rewrite(thread, entry, tool_call_id, given);
        this.grow(thread, entry, tool_call_id, { status: "in_progress" });
      }
    }
    this.#wait(thread, entry);
    return [200, entry.run];
  }

  /** What was told of a call's arguments is not what they are: its step is told again. */
  #rewrite(thread, { steps }, id, given) {
    for (const step of steps)
      for (const call of step.step_details.tool_calls ?? [])
        if (call.id === id) {
          call.function.arguments = JSON.stringify(given);
          this.emit(thread, "run.step.created", step);
        }
  }

  claim(entry, id, holder, release = false) {
    const refusal = this.#refusal(entry, id, "output");
    if (refusal) return refusal;
    const known = this.claims.get(id);
    if (known && known.holder !== holder && known.until > Date.now()) return this.#refused(409, "already_claimed");
    if (known?.holder !== holder) this.grants.set(id, (this.grants.get(id) ?? 0) + 1);
    const seconds = release ? 0 : 90;
    const until = Date.now() + seconds * 1000;
    if (release) this.claims.delete(id);
    else this.claims.set(id, { holder, until });
    return [200, { until: until / 1000, seconds }];
  }

  finish(thread, { message, run, steps }, status = "completed", code = "upstream_error") {
    for (const step of steps) {
      if (step.status !== "in_progress") continue;
      for (const call of step.step_details.tool_calls ?? [])
        if (["in_progress", "requires_action"].includes(call.status)) call.status = "interrupted";
      step.status = step.type === "reasoning" ? "completed" : { completed: "completed", failed: "failed" }[status] ?? "cancelled";
      this.emit(thread, `run.step.${step.status}`, step);
    }
    run.required_action = run.expires_at = null;
    message.status = status === "completed" ? "completed" : "incomplete";
    if (status !== "completed") message.incomplete_details = { reason: `run_${status}` };
    this.emit(thread, `message.${message.status}`, message);
    run.status = status;
    if (status === "failed") run.last_error = { code, message: "It broke." };
    this.emit(thread, `run.${status}`, run);
  }

  delete(thread) {
    this.threads.delete(thread.id);
    this.emit(thread, "deleted", { id: thread.id, object: "thread.deleted", deleted: true });
  }

  /** The log is trimmed: places before the last `keep` events can't be proven any more. */
  trim(thread, keep) {
    thread.log = keep ? thread.log.slice(-keep) : [];
  }

  /** The log is lost; runs that were going are lost with it, and what the store had not saved. */
  lose(thread, cut = true) {
    thread.epoch = `e${++this.epochs}`;
    thread.offset = 0;
    thread.log = [];
    for (const entry of thread.entries) {
      if (!entry.run || over(entry.run)) continue;
      const part = entry.message.content.at(-1);
      if (part?.text) part.text.value = part.text.value.slice(0, part.text.value.length >> 1).replace(/\d+$/, "");
      this.finish(thread, entry, "failed", "worker_lost");
    }
    if (cut) for (const source of [...this.sources]) if (source.thread === thread) this.cut(source);
  }

  cut(source) {
    if (!this.sources.delete(source)) return;
    source.readyState = 0;
    this.#dispatch(source, "error");
  }

  // ---- the wire

  #dispatch(source, name, data, lastEventId = "") {
    if (source.readyState === 2 || (source.held && name !== "error")) return;
    const event = new MessageEvent(name, { data, lastEventId });
    if (name === "open") source.onopen?.(event);
    if (name === "error") source.onerror?.(event);
    source.dispatchEvent(event);
  }

  #connect(source) {
    const { pathname, searchParams } = new URL(source.url);
    this.requests.push({ method: "STREAM", url: source.url });
    setTimeout(() => {
      if (source.readyState === 2) return;
      const thread = this.threads.get(decodeURIComponent(pathname.split("/").at(-2)));
      if (!thread || this.failOpen(source)) {
        source.readyState = 2;
        source.onerror?.(new Event("error"));
        return;
      }
      source.thread = thread;
      source.readyState = 1;
      this.sources.add(source);
      source.held = this.holds(source);
      this.#dispatch(source, "open");
      const [epoch, offset] = (searchParams.get("last_event_id") ?? "").split("-");
      const proven = epoch === thread.epoch && +offset <= thread.offset && +offset >= thread.offset - thread.log.length;
      source.cursor = +offset;
      source.epoch = epoch;
      if (!proven) this.snapshot(source);
      this.#pump(source);
    }, this.delay());
  }

  snapshot(source) {
    const { thread } = source;
    source.cursor = thread.offset;
    source.epoch = thread.epoch;
    const data = { thread_id: thread.id, data: thread.entries.slice(-this.page), has_more: thread.entries.length > this.page };
    this.#dispatch(source, "thread.snapshot", JSON.stringify(data), this.place(thread));
  }

  ping() {
    for (const source of this.sources) this.#dispatch(source, "ping", "{}", this.place({ ...source.thread, offset: source.cursor }));
  }

  #pump(source) {
    if (source.pumping) return;
    source.pumping = true;
    setTimeout(() => {
      source.pumping = false;
      while (this.sources.has(source)) {
        const { thread, cursor } = source;
        if (source.epoch !== thread.epoch) return this.snapshot(source);
        if (cursor === thread.offset) return;
        const event = thread.log[cursor - (thread.offset - thread.log.length)];
        // A reader that was too slow for the log starts again.
        if (!event) return this.snapshot(source);
        source.cursor = event.offset;
        const twist = this.twist();
        if (twist === "mute") return void this.sources.delete(source);
        for (let times = { skip: 0, repeat: 2 }[twist] ?? 1; times > 0; times--)
          this.#dispatch(source, event.name, event.data, this.place({ epoch: thread.epoch, offset: event.offset }));
      }
    }, this.delay());
  }

  fetch = (url, init = {}) =>
    new Promise((resolve, reject) => {
      const request = { method: init.method ?? "GET", url, key: init.headers?.["Idempotency-Key"],
        body: init.body && JSON.parse(init.body), init };
      this.requests.push(request);
      const abort = () => reject(new DOMException("aborted", "AbortError"));
      if (init.signal?.aborted) return abort();
      init.signal?.addEventListener("abort", abort);
      const refuse = () => reject(new TypeError("Failed to fetch"));
      setTimeout(() => {
        const fault = this.fault(request);
        if (fault === "hang") return;
        if (fault === "refuse") return refuse();
        const json = (status, body, headers = {}) => ({
          ok: status < 300, status, headers: new Headers(headers), json: async () => {
            if (status === 204) throw new SyntaxError("Unexpected end of JSON input");
            if (body === undefined) throw new SyntaxError("Unexpected token <");
            return copy(body);
          },
        });
        let answer;
        if (typeof fault === "number") answer = json(fault);
        else if (Array.isArray(fault)) answer = json(fault[0], fault[2], fault[1]);
        else if (request.key && this.#answers.has(request.key)) {
          const was = this.#answers.get(request.key);
          assert.deepEqual(was.request, [request.url, request.body], "one key for two commands");
          answer = json(...was.answer);
        } else {
          const made = this.#handle(request);
          if (request.method === "POST") {
            assert.ok(request.key, "a POST without a key");
            // Who executes a call may be another by now.
            if (!url.endsWith("/claim")) this.#answers.set(request.key, { request: [request.url, request.body], answer: copy(made) });
          }
          answer = json(...copy(made));
        }
        setTimeout(fault === "lose" ? refuse : () => resolve(answer), this.delay());
      }, this.delay());
    });

  #threads(query) {
    const all = [...this.threads.values()].reverse().map(({ id }) => ({ id, object: "thread", created_at: 1, metadata: {} }));
    const from = query.has("before") ? all.findIndex(({ id }) => id === query.get("before")) + 1 : 0;
    const to = from + Number(query.get("limit") ?? 50);
    return [200, { data: all.slice(from, to), has_more: to < all.length }];
  }

  #handle({ method, url, body }) {
    const { pathname, searchParams } = new URL(url);
    const [what, id, part, run_id, verb, call_id] = pathname.replace(/^.*\/p\//, "").split("/").map(decodeURIComponent);
    if (what === "assistants") return [200, { data: this.assistants }];
    assert.equal(what, "threads");
    if (!id && method === "GET") return this.#threads(searchParams);
    if (!id) {
      const thread = this.thread(`thread_${++this.ids}`);
      return [201, { id: thread.id, object: "thread", metadata: body.metadata ?? {} }];
    }
    const thread = this.threads.get(id);
    const none = (code) => [404, { error: { type: "invalid_request_error", code, message: `No ${code}.` } }];
    if (!thread) return none("thread_not_found");
    if (method === "DELETE") {
      this.delete(thread);
      return [204];
    }
    if (method === "GET") {
      const limit = +searchParams.get("limit");
      assert.ok(limit >= 1 && limit <= 200);
      const before = searchParams.get("before");
      const end = before ? thread.entries.findIndex(({ message }) => message.id === before) : thread.entries.length;
      if (end < 0) return none("message_not_found");
      const from = Math.max(0, end - Math.min(limit, this.page));
      return [200, { data: thread.entries.slice(from, end), has_more: from > 0 }, { "Last-Event-ID": this.place(thread) }];
    }
    const entry = thread.entries.find(({ run }) => run?.id === run_id);
    if (verb && !entry) return none("run_not_found");
    if (verb === "submit_tool_outputs") return this.answer(thread, entry, "output", body.tool_outputs);
    if (verb === "approvals") return this.answer(thread, entry, "approval", body.approvals);
    if (verb === "tool_calls") return this.claim(entry, call_id, body.holder, body.release);
    if (verb === "cancel") {
      if (!over(entry.run)) this.finish(thread, entry, "cancelled");
      return [202, entry.run];
    }
    if (part === "messages") return [201, this.say(thread, body.content)];
    assert.equal(part, "runs");
    const message = body.content === undefined ? null : this.say(thread, body.content);
    return [202, { message, runs: body.assistant_ids.map((assistant_id) => this.start(thread, assistant_id).run) }];
  }
}
