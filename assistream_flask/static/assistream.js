/**
 * assistream's helper: shows threads as they grow, and has assistants answer in them. One ES module without
 * dependencies or a build step. A page imports it from the blueprint that serves it, or from a copy of its own
 * (`createAssistream`). `assistream.min.js` and `assistream.d.ts` are made from this file.
 *
 * It reads from top to bottom:
 *
 *   Types           what pages give and get
 *   Small things    errors, time, waiting
 *   Entries         events in, entries out; knows no network and no clock
 *   The connection  how a thread reaches the page: requests, subscribers, tabs, the copy of the thread, its stream,
 *                   what watches the stream, and what puts them together (`ThreadConnection`)
 *   The commands    what pages call
 *   The exports
 */

// ---------------------------------------------------------------------------------------------------------------------
// Types
// ---------------------------------------------------------------------------------------------------------------------

/**
 * @typedef {{type: "text", text: {value: string, annotations: any[]}} |
 *   {type: "refusal", refusal: string}} Part
 * @typedef {{id: string, created_at: number, role: "user" | "assistant", content: Part[],
 *   status: "in_progress" | "completed" | "incomplete", incomplete_details: {reason: string} | null,
 *   assistant_id: string | null, run_id: string | null, metadata: Record<string, any>,
 *   [more: string]: any}} Message
 * @typedef {{id: string, status: "queued" | "in_progress" | "requires_action" | "completed" | "incomplete" |
 *   "failed" | "cancelled" | "expired", last_error: {code: string, message: string} | null,
 *   required_action: RequiredAction | null, [more: string]: any}} Run
 * @typedef {{type: string, submit_tool_outputs: {tool_calls: RequiredCall[]}}} RequiredAction
 * @typedef {{id: string, type: "function", function: {name: string, arguments: string},
 *   needs: "output" | "approval"}} RequiredCall
 * @typedef {{id: string, type: string, kind: "server" | "page" | "hosted", status: "in_progress" | "requires_action" |
 *   "completed" | "failed" | "denied" | "interrupted", error: string | null, started_at: number | null,
 *   completed_at: number | null, function: {name: string, arguments: string, output: string | null},
 *   [more: string]: any}} ToolCall
 * @typedef {{id: string, type: "reasoning" | "tool_calls", status: string, content_index: number, step_details: any,
 *   [more: string]: any}} Step
 * @typedef {{assistant_id: string | null, message: Message, run: Run | null, steps: Step[]}} Entry
 * @typedef {(entries: Entry[]) => void} Setter
 * @typedef {{id: string, created_at: number, metadata: Record<string, any>, [more: string]: any}} Thread
 * @typedef {{id: string, name: string, description: string}} Assistant
 * @typedef {{signal?: AbortSignal}} Options
 * @typedef {Error & {code: string, status?: number, runs?: Run[], decision?: any}} AssistreamError
 */

/**
 * What the page executes for its assistants, by the names of their tools. A function is called once over all tabs, with
 * the arguments and what it may want to know; what it gives is the output, what it throws is told to the model.
 * `signal` is aborted where the output is not wanted any more.
 *
 * @typedef {Record<string, (args: any, about: {signal: AbortSignal, call: RequiredCall}) => any>} Tools
 */

/**
 * How a thread reaches the page. `live`: as it grows. `connecting`: not at the moment, it is tried again.
 * `unauthenticated`: the session is over; it goes on once the user has signed in again. `polling`: a proxy holds the
 * stream back, so the page asks every few seconds. `paused`: the tab is hidden and other tabs need the connections.
 *
 * @typedef {"live" | "connecting" | "unauthenticated" | "polling" | "paused"} State
 * @typedef {Options & {onstate?: (state: State) => void, tools?: Tools}} StreamOptions
 */

// ---------------------------------------------------------------------------------------------------------------------
// Small things: errors, time, waiting
// ---------------------------------------------------------------------------------------------------------------------

/** Whether a run, or the message of a user, has come to its end. */
const isOver = ({ status = "" }) => /complete|failed|cancelled|expired/.test(status);

const failure = (code = "", message = "", more = {}) => Object.assign(new Error(message), { code, ...more });

/** @param {Run[]} [runs] */
const abortError = (runs) => Object.assign(new DOMException("Aborted", "AbortError"), { runs });

/** @type {(ok: any, rule: string, got: any) => void} */
const need = (ok, rule, got) => {
	if (!ok) throw new TypeError(`${rule}, got ${JSON.stringify(got)}`);
};

/** Whether two values of JSON are alike. @type {(a: any, b: any) => boolean} */
const equal = (a, b) =>
	a === b ||
	(a && b && typeof a === "object" && Object.keys(a).length === Object.keys(b).length &&
		Object.keys(a).every((key) => equal(a[key], b[key])));

/** @type {Set<string>} */
const warned = new Set();

/** Warns once a page: the cause stays, and a console full of it helps nobody. */
const warn = (/** @type {string} */ text) => {
	if (warned.has(text)) return;
	warned.add(text);
	console.warn(`assistream: ${text}`);
};

/**
 * Calls what the page gave: a bug of its own must not stop the stream.
 * @type {(call: any, value: any) => void}
 */
const callPage = (call, value) => {
	try {
		call?.(value);
	} catch (error) {
		reportError(error);
	}
};

/** Unlike randomUUID, without a secure context too. */
const randomId = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

const isHidden = () => !!globalThis.document?.hidden;

/**
 * Milliseconds that only go forward, for durations. Date.now() goes back where the computer's clock is set, and a
 * watchdog would see nothing for as long; performance.now() does not, but stands still while a Mac or a Linux computer
 * sleeps, and a stream that died meanwhile would pass for a fresh one. So what it misses is added.
 */
const makeClock = (missed = 0) => () => {
	const ticks = performance.now();
	missed = Math.max(missed, Date.now() - ticks);
	return ticks + missed;
};

/**
 * Milliseconds before the next try, in an outage that is `age` old. A deploy is over in seconds: waits that double
 * would keep the page away for as long again as the server was. The jitter keeps a crowd from coming all at once.
 */
const backoff = (tries = 0, age = 0) =>
	Math.min(age < 30e3 ? 3e3 : 15e3, 500 * 2 ** tries) * (0.5 + Math.random() / 2);

/**
 * Calls `back` whenever the page is looked at or the network is back.
 * @type {(back: () => void, signal: AbortSignal) => void}
 */
const onBack = (back, signal) => {
	for (const type of ["online", "pageshow", "visibilitychange"])
		globalThis.addEventListener?.(type, () => (type[0] === "v" && document.hidden) || back(), { signal });
};

/**
 * Waits, at most until the page is looked at or the network is back; `wakers` gets what ends it sooner.
 * @type {(ms: number, signal?: AbortSignal, wakers?: Set<() => void>) => Promise<any>}
 */
const sleep = (ms, signal, wakers) =>
	new Promise((resolve) => {
		const off = new AbortController();
		const done = () => {
			off.abort();
			clearTimeout(timer);
			wakers?.delete(done);
			resolve(0);
		};
		const timer = setTimeout(done, signal?.aborted ? 0 : ms);
		wakers?.add(done);
		onBack(done, off.signal);
		signal?.addEventListener("abort", done, off);
	});

// ---------------------------------------------------------------------------------------------------------------------
// Entries: events in, entries out
// ---------------------------------------------------------------------------------------------------------------------

const EVENTS =
	"snapshot deleted message.created message.delta message.completed message.incomplete run.created " +
	"run.queued run.in_progress run.requires_action run.completed run.incomplete run.failed run.cancelled " +
	"run.expired run.step.created run.step.delta run.step.completed run.step.failed run.step.cancelled";

/**
 * An event id is "<epoch>-<offset>": which log of the thread, and the number of the event in it.
 * @type {(id: any) => {epoch: string, offset: number}}
 */
const parseEventId = (id) => {
	const [epoch, offset] = id.split("-");
	return { epoch, offset: +offset };
};

/** @typedef {{entry: Entry, offset: number, index: number}} Slot an entry as of the event `offset`, and its index */

/**
 * The entries of one thread, made of a snapshot, older pages and events.
 *
 * A snapshot is the newest page. While older ones are missing nothing is shown, and events about entries that are not
 * there yet are kept. Each entry is exact as of an offset of its own (that of the page it came with), and takes only
 * the events after it.
 */
class ThreadEntries {
	/** In the thread's order. @type {Slot[]} */
	#slots = [];
	/** By message id and by run id. @type {Map<string, Slot>} */
	#byId = new Map();
	/** Events whose entry is not there yet: name, data, offset. @type {[string, any, number][]} */
	#early = [];
	/** What changed since it was last shown; null while older pages are missing. @type {Set<Slot> | null} */
	#changed = null;
	/** What was shown last. @type {Entry[]} */
	#shown = [];
	/** The same by message id, so that what did not change stays the same object. @type {Map<string, Entry>} */
	#known = new Map();
	/** Runs that wait for a page or a person, of what was shown. @type {Map<string, Run>} */
	waiting = new Map();
	/** Objects that nobody was shown yet, so free to change: a long text costs no copy for each word. */
	#owned = new Set();

	/** Starts from the newest page. @type {(entries: Entry[], offset: number) => void} */
	reset(entries, offset) {
		this.#slots = [];
		this.#byId = new Map();
		this.#early = [];
		this.#changed = null;
		this.waiting.clear();
		this.prepend(entries, offset);
	}

	/** Puts an older page before the rest. @type {(entries: Entry[], offset: number) => void} */
	prepend(entries, offset) {
		this.#slots = [...entries.map((entry) => this.#slot(entry, offset)), ...this.#slots];
		this.#applyEarly();
	}

	/**
	 * Whether the pages so far reach what is known and final. If so, the older entries are taken from what was shown:
	 * their pages need not come again.
	 */
	reachesKnown() {
		const first = this.#known.get(this.oldestId);
		const i = first ? this.#shown.indexOf(first) : -1;
		const older = this.#shown.slice(0, i);
		if (i < 0 || !older.every(({ message, run }) => [message, run ?? message].every(isOver))) return false;
		this.prepend(older, 0);
		return true;
	}

	/** All pages are here. Nothing is shown before it. */
	complete() {
		this.#slots.forEach((slot, i) => { slot.index = i; });
		this.#changed = new Set(this.#slots);
	}

	/** Takes one event, by its name without "thread.". @type {(name: string, data: any, offset: number) => void} */
	apply(name, data, offset) {
		const [kind, what, step] = name.split(".");
		const id = step ? data.run_id : data.id;
		if (name === "message.created" && !this.#byId.has(id)) this.#append(data);
		const slot = this.#byId.get(id);
		if (!slot) {
			// Its page or its message is on the way.
			if (!this.#changed || kind === "run") this.#early.push([name, data, offset]);
			return;
		}
		if (offset <= slot.offset) return;
		this.#changed?.add(slot);
		const entry = this.#own(slot, "entry");
		if (step) this.#applyStep(this.#own(entry, "steps"), step, data);
		else if (what === "delta") this.#merge(this.#own(entry, kind), data.delta);
		else entry[kind] = data;
	}

	/** Gives what to show, the same array where nothing changed; null while pages are missing. */
	show() {
		if (!this.#changed) return null;
		const now = this.#shown.slice(0, this.#slots.length);
		let same = this.#slots.length === this.#shown.length;
		for (const slot of this.#changed) {
			const { index } = slot;
			now[index] = slot.entry = this.#sameAsKnown(slot.entry);
			this.#known.set(slot.entry.message.id, slot.entry);
			const { run } = slot.entry;
			if (run?.required_action) this.waiting.set(run.id, run);
			else if (run) this.waiting.delete(run.id);
			same &&= now[index] === this.#shown[index];
		}
		this.#owned.clear();
		this.#changed.clear();
		if (!same) this.#shown = now;
		return this.#shown;
	}

	/** The id of the oldest message that is here: older pages are those before it. */
	get oldestId() {
		return this.#slots[0].entry.message.id;
	}

	/** @type {(run_id: string) => boolean} */
	has(run_id) {
		return this.#byId.has(run_id);
	}

	/** @type {(run_id: string) => Run | null | undefined} undefined: its entry is not there */
	run(run_id) {
		return this.#byId.get(run_id)?.entry.run;
	}

	/** Whether a run is under way in what was shown. */
	get running() {
		return this.#shown.some(({ run }) => run && !isOver(run));
	}

	/** @type {(entry: Entry, offset: number) => Slot} */
	#slot(entry, offset) {
		const { id, run_id } = entry.message;
		const slot = { entry: this.#sameAsKnown(entry), offset, index: this.#slots.length };
		this.#byId.set(id, slot).set(run_id ?? id, slot);
		return slot;
	}

	/** Adds the entry of a message that was created. */
	#append(/** @type {Message} */ message) {
		this.#slots.push(this.#slot({ assistant_id: message.assistant_id, message, run: null, steps: [] }, 0));
		this.#applyEarly();
	}

	#applyEarly() {
		for (const [name, data, offset] of this.#early.splice(0)) this.apply(name, data, offset);
	}

	/** @type {(entry: Entry) => Entry} */
	#sameAsKnown(entry) {
		const known = this.#known.get(entry.message.id);
		return known && equal(entry, known) ? known : entry;
	}

	/** @type {(steps: any[], what: string, data: any) => void} */
	#applyStep(steps, what, data) {
		let i = steps.findIndex(({ id }) => id === data.id);
		if (i < 0) i = steps.length;
		if (what === "delta") this.#merge(this.#own(steps, i), data.delta);
		else steps[i] = data;
	}

	/** Gives `holder[key]`, as a copy where it was shown: what `set` got must never change. */
	#own(/** @type {any} */ holder, /** @type {string | number} */ key) {
		const value = holder[key];
		if (!this.#owned.has(value))
			this.#owned.add((holder[key] = Array.isArray(value) ? [...value] : { ...value }));
		return holder[key];
	}

	/**
	 * Merges a delta as the Assistants API means it: lists by `index`, growing texts appended, the rest replaced.
	 * @type {(target: any, delta: object) => void}
	 */
	#merge(target, delta) {
		for (const [key, value] of Object.entries(delta)) {
			if (Array.isArray(value)) {
				const items = this.#own(target, key);
				if (key === "annotations") items.push(...value);
				else for (const { index, ...part } of value) this.#merge(this.#own(items, index), part);
			} else if (value && typeof value === "object") {
				if (key === "text") target.text ??= { value: "", annotations: [] };
				this.#merge(this.#own(target, key), value);
			} else {
				const grows = /^(value|text|refusal|arguments)$/.test(key);
				target[key] = grows ? (target[key] ?? "") + value : value;
			}
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The connection: requests
// ---------------------------------------------------------------------------------------------------------------------

/** @type {(thread_id: string) => string} */
const threadPath = (thread_id) => {
	need(thread_id && typeof thread_id === "string", "thread_id must be a non-empty string", thread_id);
	return `threads/${encodeURIComponent(thread_id)}`;
};

/** @type {(thread_id: string, run_id: string) => string} */
const runPath = (thread_id, run_id) => {
	need(run_id && typeof run_id === "string", "run_id must be a non-empty string", run_id);
	return `${threadPath(thread_id)}/runs/${encodeURIComponent(run_id)}`;
};

const postOf = (/** @type {object} */ body) => ({
	method: "POST",
	body: JSON.stringify(body),
	headers: { "Content-Type": "application/json", "Idempotency-Key": randomId() },
});

/** Where the blueprint is, and requests to it. */
class Server {
	clock = makeClock();
	#options;
	#page = "";
	/** End the waits of streams and polls: a command that succeeds proves that the server is there and knows the user. */
	#wakers = /** @type {Set<() => void>} */ (new Set());

	/** @param {{baseUrl?: string, fetch?: typeof fetch, EventSource?: typeof EventSource}} options */
	constructor(options) {
		this.#options = options;
	}

	url(path = "") {
		const { baseUrl } = this.#options;
		const base = baseUrl == null ? import.meta.url : globalThis.document?.baseURI;
		return new URL((baseUrl ?? ".").replace(/\/*$/, "/") + path, base).href;
	}

	/** What this page is called where it claims a tool call. */
	get page() {
		return (this.#page ||= randomId());
	}

	/** @type {(path: string) => EventSource} */
	eventSource(path) {
		return new (this.#options.EventSource ?? EventSource)(this.url(path));
	}

	/**
	 * Waits like `sleep`, and at most until a command succeeds.
	 * @type {(ms: number, signal: AbortSignal) => Promise<any>}
	 */
	sleep(ms, signal) {
		return sleep(ms, signal, this.#wakers);
	}

	/**
	 * Asks for a page of a thread, for as long as it takes.
	 * @type {(path: string, signal?: AbortSignal) => Promise<any[]>} its body and its event id
	 */
	get(path, signal) {
		return this.#insist(path, undefined, signal);
	}

	/**
	 * Asks for what is no thread's, or deletes: for minutes, as whoever called waits for the answer.
	 * @type {(method: "GET" | "DELETE", path: string, signal?: AbortSignal) => Promise<any[]>}
	 */
	command(method, path, signal) {
		return this.#insist(path, { method }, signal);
	}

	/**
	 * Sends a command, for minutes under one key, as its first answer may be lost.
	 * @type {(path: string, body: object, signal?: AbortSignal) => Promise<any[]>}
	 */
	post(path, body, signal) {
		return this.#insist(path, postOf(body), signal);
	}

	/** Sends a page's last words: they arrive though it is gone. @type {(path: string, body: object) => void} */
	leave(path, body) {
		this.request(path, { ...postOf(body), keepalive: true }).catch(() => {});
	}

	/**
	 * Tries once, for a minute at most: where a connection hangs, nobody else tells. `final`: trying again does not
	 * help. Rejects only where `signal` ended it.
	 * @type {(path: string, command?: any, signal?: AbortSignal) =>
	 *   Promise<{answer?: any[], error?: any, final?: any, after?: any}>} the answer's body and its event id
	 */
	async request(path, command, signal) {
		const href = this.url(path);
		// Not AbortSignal.any(), which browsers before 2024 lack.
		const until = new AbortController();
		const stop = () => until.abort();
		const timer = setTimeout(stop, 60e3);
		signal?.addEventListener("abort", stop, until);
		try {
			const response = await (this.#options.fetch ?? fetch)(
				href, { credentials: "same-origin", ...command, signal: until.signal });
			const { ok, status, headers } = response;
			const empty = status === 204;
			const answer = empty ? null : await response.json().catch((error) => { if (ok) throw error; });
			if (ok) return { answer: [answer, headers.get("Last-Event-ID")] };
			const error = failure(`http_${status}`, `The server answered ${status}`, { status, ...answer?.error });
			// The app itself may ask who it is before the blueprint does, in words of its own.
			if (status === 401 && !answer?.error?.code) error.code = "unauthenticated";
			// Without our error it is some proxy's word.
			const final = ![408, 429, 502, 503, 504].includes(status) &&
				(command || status === 401 || (status < 500 && answer?.error));
			return { error, final, after: parseFloat(headers.get("Retry-After") ?? "") };
		} catch (reason) {
			if (signal?.aborted) throw abortError();
			return { error: failure("network_error", `No answer: ${reason}`) };
		} finally {
			clearTimeout(timer);
			// Lets go of `signal`.
			stop();
		}
	}

	/**
	 * Tries until there is an answer, or none to be had.
	 * @type {(path: string, command?: {method: string, body?: string, headers?: object}, signal?: AbortSignal) =>
	 *   Promise<any[]>}
	 */
	async #insist(path, command, signal) {
		for (let tries = 0, since = 0; ; tries++) {
			if (signal?.aborted) throw abortError();
			const { answer, error, final, after } = await this.request(path, command, signal);
			if (answer) {
				if (command) for (const wake of [...this.#wakers]) wake();
				return answer;
			}
			// An earlier try deleted it, and its answer was lost: a DELETE has no key.
			if (command?.method === "DELETE" && tries && error.status === 404) return [];
			// One that is told to wait for seconds does, or, as by a proxy, not told how long; what would be minutes is the
			// user's to decide.
			const busy = command && error.status === 429;
			if (final || (busy && (after > 5 || tries > 3)) || (command && tries > 24)) throw error;
			since ||= this.clock();
			if (error.code === "network_error" && globalThis.navigator?.onLine === false) {
				// What is sent offline waits, for as long as it takes.
				tries = Math.min(tries, 5);
				since = this.clock();
			}
			const wait = Math.max(backoff(tries, this.clock() - since), after * 1e3 || 0);
			await sleep(wait, signal, command ? undefined : this.#wakers);
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The connection: who looks at a thread, and when they are told
// ---------------------------------------------------------------------------------------------------------------------

/**
 * Has `flush` called soon: at the next frame, and in a hidden tab, which has no frames, once for many deltas. Timers of
 * hidden tabs wait a second, after five minutes a minute: what is `urgent`, such as a run's end, never waits for one,
 * nor does text when the last flush is long ago.
 */
class FlushTimer {
	#call;
	#clock;
	#flushed = 0;
	/** @type {any} */
	#due;

	/** @param {() => void} call @param {() => number} clock */
	constructor(call, clock) {
		this.#call = call;
		this.#clock = clock;
	}

	soon(urgent = true) {
		const left = Math.min(this.#flushed + 75 - this.#clock(), 75);
		if (globalThis.document?.visibilityState === "visible") {
			if (this.#due) return;
			// In a tab that is hidden before the frame, none comes.
			this.#due = setTimeout(this.#flush, 200);
			requestAnimationFrame(this.#flush);
		} else {
			this.#due ??= setTimeout(this.#flush, left);
			if (urgent || left <= 0) queueMicrotask(this.#flush);
		}
	}

	/** What waits for a timer of the hidden tab gets a frame, now that it is looked at. */
	lookedAt() {
		if (!this.#due) return;
		this.#due = clearTimeout(this.#due);
		this.soon();
	}

	#flush = () => {
		if (!this.#due) return;
		this.#due = clearTimeout(this.#due);
		this.#flushed = this.#clock();
		this.#call();
	};
}

/**
 * `waits`: for a run's end, so a tab that let go of its stream asks for it. `state`: what it was told last.
 * @typedef {{set?: any, seen: (shown: Entry[]) => void, fail: (error: any) => void, onstate?: (state: State) => void,
 *   tools?: Tools, waits?: boolean, state?: State}} Subscriber
 */

/** All who look at one thread. Each `set` is called once for a change, however many subscribers share it. */
class Subscribers {
	#entries;
	#timer;
	/** @type {Set<Subscriber>} */
	#all = new Set();
	/** What each `set` got last. @type {Map<Setter, Entry[]>} */
	#got = new Map();
	/** @type {State} */
	#state = "connecting";
	/** @type {any} */
	#ended;

	#shown;

	/** @param {ThreadEntries} entries @param {() => number} clock @param {() => void} shown is told when all is shown */
	constructor(entries, clock, shown) {
		this.#entries = entries;
		this.#shown = shown;
		this.#timer = new FlushTimer(() => this.#flush(), clock);
	}

	/** @type {(subscriber: Subscriber) => void} */
	add(subscriber) {
		this.#all.add(subscriber);
		// Not before the call that subscribes has returned.
		queueMicrotask(() => this.#inform(subscriber));
		this.changed();
	}

	/** @type {(subscriber: Subscriber) => void} */
	remove(subscriber) {
		this.#all.delete(subscriber);
		const { set } = subscriber;
		if (set && ![...this.#all].some((other) => other.set === set)) this.#got.delete(set);
	}

	get count() {
		return this.#all.size;
	}

	/** Whether anybody has got the thread. */
	get shows() {
		return this.#got.size > 0;
	}

	/** Whether anybody waits for a run's end. */
	get waits() {
		return [...this.#all].some(({ waits }) => waits);
	}

	changed(urgent = true) {
		this.#timer.soon(urgent);
	}

	lookedAt() {
		this.#timer.lookedAt();
	}

	/** @type {(state: State) => void} */
	setState(state) {
		if (state === this.#state) return;
		this.#state = state;
		this.#all.forEach((subscriber) => this.#inform(subscriber));
	}

	/** The function of a tool, of whoever brought one. @type {(name: string) => Tools[string] | undefined} */
	tool(name) {
		for (const { tools } of this.#all) if (tools && Object.hasOwn(tools, name)) return tools[name];
	}

	/** Tells all that it is over, after what changed before. */
	end(/** @type {any} */ error) {
		this.#ended = error;
		this.changed();
	}

	#flush() {
		const shown = this.#entries.show();
		if (shown) for (const { set } of this.#all) this.#give(set, shown);
		if (shown) this.#shown();
		for (const subscriber of this.#all)
			if (this.#ended) subscriber.fail(this.#ended);
			else if (shown) subscriber.seen(shown);
	}

	/** @type {(set: any, shown: Entry[]) => void} */
	#give(set, shown) {
		if (!set || this.#got.get(set) === shown) return;
		// A copy, as `set` may have got this array before it left.
		const array = this.#got.has(set) ? shown : [...shown];
		this.#got.set(set, shown);
		callPage(set, array);
	}

	/** @type {(subscriber: Subscriber) => void} */
	#inform(subscriber) {
		if (!this.#all.has(subscriber) || subscriber.state === this.#state) return;
		subscriber.state = this.#state;
		callPage(subscriber.onstate, this.#state);
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The connection: what the page executes
// ---------------------------------------------------------------------------------------------------------------------

/** How often a page that does not execute a call looks whether the one that does is gone. */
const CLAIM_MS = 20e3;

/** An output as the model gets it. @type {(value: any) => string} */
const outputText = (value) => (typeof value === "string" ? value : JSON.stringify(value) ?? "null");

/** Executes the calls of one thread that wait for a page's output. Over all pages each once, by the server's word. */
class PageTools {
	#server;
	#path;
	#tool;
	/** By call id: ends what is under way. @type {Map<string, AbortController>} */
	#working = new Map();
	/** Where a claim is sent, of each call whose function has not given anything yet. @type {Set<string>} */
	#claimed = new Set();

	/** @param {Server} server @param {string} path @param {(name: string) => Tools[string] | undefined} tool */
	constructor(server, path, tool) {
		this.#server = server;
		this.#path = path;
		this.#tool = tool;
	}

	/** Begins what waits and is not under way here; ends what waits no more. @type {(runs: Iterable<Run>) => void} */
	look(runs) {
		const waiting = new Set();
		for (const run of runs)
			for (const call of run.required_action?.submit_tool_outputs.tool_calls ?? []) {
				const tool = this.#tool(call.function.name);
				if (call.needs !== "output" || !tool) continue;
				waiting.add(call.id);
				if (!this.#working.has(call.id)) this.#execute(`${this.#path}/runs/${run.id}`, call, tool);
			}
		for (const [id, working] of this.#working) if (!waiting.has(id)) working.abort();
	}

	/**
	 * The page is gone for good, its functions with it: another one need not wait until their claims ran out. One whose
	 * function has given its output is kept, as that may still arrive.
	 */
	letGo() {
		for (const path of this.#claimed) this.#server.leave(path, { holder: this.#server.page, release: true });
	}

	/** @type {(path: string, call: RequiredCall, tool: Tools[string]) => Promise<void>} */
	async #execute(path, call, tool) {
		const working = new AbortController(), { signal } = working;
		const claims = `${path}/tool_calls/${call.id}/claim`;
		this.#working.set(call.id, working);
		/** Milliseconds for which this page is the one; 0: another is. */
		const claim = async () => {
			this.#claimed.add(claims);
			try {
				return (await this.#server.post(claims, { holder: this.#server.page }, signal))[0].seconds * 1e3;
			} catch (/** @type {any} */ error) {
				this.#claimed.delete(claims);
				if (error.code === "already_claimed") return 0;
				throw error;
			}
		};
		let renewal;
		try {
			let ms;
			while (!(ms = await claim())) await sleep(CLAIM_MS * (0.5 + Math.random() / 2), signal);
			// Two may fail, or be late: a tab that is hidden for minutes has a timer once a minute. One of 25 days fires at
			// once, again and again.
			renewal = setInterval(() => claim().catch(() => {}), Math.min(ms / 3, 3600e3));
			let output;
			try {
				output = await tool(JSON.parse(call.function.arguments), { signal, call });
			} catch (/** @type {any} */ error) {
				output = { error: String(error?.message ?? error) };
			}
			clearInterval(renewal);
			this.#claimed.delete(claims);
			const tool_outputs = [{ tool_call_id: call.id, output: outputText(output) }];
			await this.#server.post(`${path}/submit_tool_outputs`, { tool_outputs }, signal);
		} catch (/** @type {any} */ error) {
			// Another page was first, or the run is over: that is usual.
			if (!signal.aborted && error.status !== 409 && error.status !== 404) reportError(error);
		} finally {
			clearInterval(renewal);
			this.#claimed.delete(claims);
			// Not before the run says so: what it said last may still name the call.
			if (signal.aborted) this.#working.delete(call.id);
			else signal.addEventListener("abort", () => this.#working.delete(call.id));
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The connection: how many streams all tabs have
// ---------------------------------------------------------------------------------------------------------------------

/** Streams that all tabs of an origin may have over HTTP/1.1. A browser opens six connections; two are for requests. */
const MOST_STREAMS = 4;

/** Whether `origin` is known to be spoken to over HTTP/2 or 3, where any number of streams share one connection. */
const multiplexed = (/** @type {string} */ origin) => {
	const { performance } = globalThis;
	const entries = ["navigation", "resource"].flatMap((type) => performance?.getEntriesByType?.(type) ?? []);
	const used = entries.filter((/** @type {any} */ { name, nextHopProtocol }) =>
		nextHopProtocol && name.startsWith(`${origin}/`));
	return /^h[23]/.test(/** @type {any} */ (used.at(-1))?.nextHopProtocol ?? "");
};

/**
 * Counts the streams of all tabs, which tell each other theirs, so that six connections an origin are enough: over
 * HTTP/1.1 the sixth stream would hang every tab and every request of the app until one is closed. Every tab decides
 * for itself, and all alike, from the same facts: which tabs have how many streams (those they let go of included),
 * and since when they are hidden. Web Locks would be less work, but need HTTPS, and the limit is one of plain HTTP.
 *
 * Each stream is a function that is told whether to let go. Nothing is made before the first one.
 */
class Tabs {
	#server;
	/** @type {Set<(on: boolean) => void>} */
	#streams = new Set();
	/** @type {Map<string, {id: string, streams: number, hidden: number, missed: number}>} */
	#others = new Map();
	#id = "";
	/** Since when; 0: visible. Compared with other tabs', and the one clock that they share is Date.now(). */
	#hidden = 0;
	/** The page was left, and may come back by the back button. */
	#away = false;
	/** @type {BroadcastChannel | undefined} */
	#channel;
	/** @type {any} */
	#timer;
	#off = new AbortController();

	/** @param {Server} server */
	constructor(server) {
		this.#server = server;
	}

	get #origin() {
		return new URL(this.#server.url()).origin;
	}

	/** @type {(hold: (on: boolean) => void) => void} */
	enter(hold) {
		if (!globalThis.document) return;
		this.#streams.add(hold);
		if (this.#streams.size === 1) this.#start();
		else this.#post();
		this.#decide();
	}

	/** @type {(hold: (on: boolean) => void) => void} */
	leave(hold) {
		if (!this.#streams.delete(hold)) return;
		if (!this.#streams.size) return this.#stop();
		this.#post();
		this.#decide();
	}

	#start() {
		this.#id ||= crypto.getRandomValues(new Uint32Array(2)).join("-");
		this.#hidden = isHidden() ? Date.now() : 0;
		this.#off = new AbortController();
		this.#timer = setInterval(() => this.#ask(), 30e3);
		const on = (/** @type {string} */ type, /** @type {() => void} */ then) =>
			globalThis.addEventListener?.(type, then, this.#off);
		on("visibilitychange", () => this.#look());
		on("pagehide", () => this.#leavePage());
		on("pageshow", () => this.#comeBack());
		this.#openChannel();
	}

	#stop() {
		this.#closeChannel();
		clearInterval(this.#timer);
		this.#off.abort();
		this.#away = false;
	}

	#openChannel() {
		try {
			this.#channel = new BroadcastChannel(`assistream ${this.#origin}`);
			this.#channel.onmessage = ({ data }) => this.#hear(data);
		} catch { /* There is none, or storage is forbidden: this tab counts its own only. */ }
		this.#post({ ask: true });
	}

	#closeChannel() {
		this.#post({ streams: 0 });
		this.#channel = void this.#channel?.close();
		this.#others.clear();
	}

	#post(more = {}) {
		this.#channel?.postMessage({ id: this.#id, streams: this.#streams.size, hidden: this.#hidden, ...more });
	}

	#hear(/** @type {any} */ data) {
		if (data.streams) this.#others.set(data.id, { ...data, missed: 0 });
		else this.#others.delete(data.id);
		if (data.ask) this.#post();
		this.#decide();
	}

	/**
	 * Forgets tabs that vanished without a word. Those that are there answer, however much their timers are
	 * throttled; by the time alone, all would be forgotten when a laptop wakes.
	 */
	#ask() {
		for (const other of [...this.#others.values()]) if (++other.missed > 2) this.#others.delete(other.id);
		this.#post({ ask: true });
		this.#decide();
	}

	#look() {
		this.#hidden = isHidden() ? this.#hidden || Date.now() : 0;
		this.#post();
		this.#decide();
	}

	/** A page with an open channel or stream can't be kept for the back button. */
	#leavePage() {
		// Node may call it after `off`, once its listener on the signal was collected as garbage.
		this.#away = this.#streams.size > 0;
		this.#closeChannel();
		this.#decide();
	}

	#comeBack() {
		if (!this.#away) return;
		this.#away = false;
		this.#openChannel();
		this.#look();
	}

	/** Whether this tab's streams are among the first four: visible tabs first, then the last hidden. */
	#fits() {
		let left = MOST_STREAMS - this.#streams.size;
		for (const other of this.#others.values()) {
			const sooner = other.hidden > this.#hidden || (other.hidden === this.#hidden && other.id < this.#id);
			if (!other.hidden || sooner) left -= other.streams;
		}
		return !this.#hidden || left >= 0;
	}

	#decide() {
		const holds = this.#away || !(this.#fits() || multiplexed(this.#origin));
		if (holds && !this.#away)
			warn("This tab lets go of its event stream until it is looked at: a browser opens only six connections to a " +
				"server over HTTP/1.1, over all tabs, and with each taken by a stream the whole app would hang. Serve " +
				"HTTP/2 at the proxy, and every tab keeps its own.");
		for (const hold of this.#streams) hold(holds);
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The connection: the page's copy of a thread
// ---------------------------------------------------------------------------------------------------------------------

/**
 * What a copy needs: `older` gets the page before a message; `changed`, `complete` and `end` tell; `restart` is to get
 * a snapshot, as the copy can't be made exact by what came.
 * @typedef {{older: (message_id: string) => Promise<any[]>, progress: () => void, changed: (urgent?: boolean) => void,
 *   restart: () => void, end: (error: any) => void}} CopyNeeds
 */

/** A thread's entries, and the place in its log as of which they are exact. */
class ThreadCopy {
	entries = new ThreadEntries();
	/** Of what was received last; "" asks for a snapshot. */
	lastEventId = "";
	/** All pages were there once: from then on a lost session is waited out. */
	loaded = false;
	#needs;
	#epoch = "";
	#offset = 0;
	/** The offset of the last snapshot: an older page as of a time before it would have holes. */
	#snapshot = 0;
	/** Counts loads, so that an older one stops. */
	#load = 0;

	/** @param {CopyNeeds} needs */
	constructor(needs) {
		this.#needs = needs;
	}

	/** Takes an event, by its name without "thread.". @type {(name: string, data: any, id: any) => any} */
	receive(name, data, id) {
		if (name === "deleted") return this.#needs.end(failure("thread_not_found", "The thread was deleted"));
		const { epoch, offset } = parseEventId(id);
		if (name === "snapshot") {
			// A proxy may have held this one back while the polls went on.
			if (this.lastEventId && epoch === this.#epoch && offset < this.#offset) return;
			this.entries.reset(data.data, offset);
			this.lastEventId = id;
			this.#epoch = epoch;
			this.#offset = this.#snapshot = offset;
			return this.#loadOlder(data.has_more);
		}
		if (epoch !== this.#epoch || offset > this.#offset + 1) return this.#restart();
		if (offset <= this.#offset) return;
		this.#needs.progress();
		this.entries.apply(name, data, offset);
		this.lastEventId = id;
		this.#offset = offset;
		// A run's step, and all of a message, can wait for a hidden tab's timer.
		this.#needs.changed(/^run\.[^s]/.test(name));
	}

	/** Takes the newest page where it has more than this copy. @type {(page: any, id: any) => Promise<void>} */
	async refresh(page, id) {
		const { epoch, offset } = parseEventId(id);
		if (!this.lastEventId || epoch !== this.#epoch || offset > this.#offset)
			await this.receive("snapshot", page, id);
	}

	clear() {
		this.entries.reset([], 0);
		this.entries.complete();
	}

	/** Takes no older pages any more. */
	stop() {
		this.#load++;
	}

	#restart() {
		this.lastEventId = "";
		this.#needs.restart();
	}

	async #loadOlder(more = false) {
		const load = ++this.#load;
		try {
			while (more && !this.entries.reachesKnown()) {
				const [page, id] = await this.#needs.older(this.entries.oldestId);
				if (load !== this.#load) return;
				const { epoch, offset } = parseEventId(id);
				if (epoch !== this.#epoch || offset < this.#snapshot) return this.#restart();
				this.entries.prepend(page.data, offset);
				more = page.has_more && page.data[0];
			}
			this.#needs.progress();
			this.loaded = true;
			this.entries.complete();
			this.#needs.changed();
		} catch (/** @type {any} */ error) {
			if (load !== this.#load) return;
			// The way back waits where that helps.
			if (error.code === "message_not_found" || (this.loaded && error.code === "unauthenticated")) this.#restart();
			else this.#needs.end(error);
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The connection: one thread's stream, and what watches it
// ---------------------------------------------------------------------------------------------------------------------

/** One EventSource at a time, and what is known of it. It tells neither of its silence nor why it failed. */
class EventStream {
	/** The server answered it. */
	opened = false;
	/** It said anything. */
	spoke = false;
	/** When it last did, or was asked for. */
	heard = 0;
	#server;
	#on;
	/** @type {EventSource | undefined} */
	#source;

	/**
	 * @param {Server} server
	 * @param {{opened: () => void, failed: () => void, ping: () => void, spoke: () => void,
	 *   event: (name: string, data: any, id: string) => void}} on `spoke` comes before each event
	 */
	constructor(server, on) {
		this.#server = server;
		this.#on = on;
	}

	get active() {
		return !!this.#source;
	}

	get silence() {
		return this.#server.clock() - this.heard;
	}

	/** @type {(path: string) => void} */
	open(path) {
		this.close();
		this.opened = this.spoke = false;
		this.heard = this.#server.clock();
		const source = this.#source = this.#server.eventSource(path);
		source.onopen = () => {
			this.opened = true;
			this.#on.opened();
		};
		source.onerror = () => this.#on.failed();
		source.addEventListener("ping", () => {
			this.#on.ping();
			this.#hear();
		});
		for (const name of EVENTS.split(" "))
			source.addEventListener(`thread.${name}`, (/** @type {MessageEvent} */ event) => {
				this.#hear();
				this.#on.event(name, JSON.parse(event.data), event.lastEventId);
			});
	}

	close() {
		this.#source = void this.#source?.close();
	}

	/** The stream's bytes arrive. */
	#hear() {
		this.heard = this.#server.clock();
		this.spoke = true;
		this.#on.spoke();
	}
}

/**
 * Finds streams that died, of which nobody tells, and those that a proxy holds back. A plain request tells them from
 * quiet ones: it knows what the stream has not told.
 */
class Watchdog {
	#connection;
	#server;
	/** When it last looked: a gap means that the computer slept. */
	#looked;
	/** It found out before that the stream's last words were missing. */
	#suspected = false;
	#doubting = false;

	/** @param {ThreadConnection} connection @param {Server} server */
	constructor(connection, server) {
		this.#connection = connection;
		this.#server = server;
		this.#looked = server.clock();
	}

	/** Called every few seconds. */
	look() {
		const { stream, copy, polling } = this.#connection;
		const slept = this.#server.clock() - this.#looked > 15e3;
		const { silence } = stream;
		// A snapshot comes at once; otherwise there may be silence until the ping, which comes every 15 s.
		const late = silence > (copy.lastEventId ? 20e3 : 10e3);
		this.#looked = this.#server.clock();
		if (!stream.active) return;
		// It was one more try; the polls go on.
		if (polling) late && stream.close();
		// Nothing is known of a stream that a laptop slept through.
		else if (silence > 40e3 || (slept && !stream.spoke)) this.#connection.open();
		else if (late) this.#doubt();
	}

	/** The page is looked at, or the network is back: a stream that is silent by then is opened anew sooner. */
	lookedAt() {
		const { stream, polling } = this.#connection;
		const patience = stream.opened ? 20e3 : 2e3;
		if (stream.active && !polling && stream.silence > patience) this.#connection.open();
	}

	/** Asks. Over a slow network the stream, which was asked for long before, speaks first. */
	async #doubt() {
		if (this.#doubting) return;
		this.#doubting = true;
		const { stream, copy, way } = this.#connection;
		const { heard } = stream, newest = this.#connection.newest(50);
		try {
			const { answer } = await this.#server.request(newest);
			// The server is away or fails, so the stream was never heard: another one, once it answers.
			if (!answer) await this.#server.get(newest, way);
			// What is on the way arrives.
			else await sleep(2e3, way);
			if (stream.heard !== heard || way.aborted) return;
			if (!answer) this.#connection.open();
			// Open and with nothing to tell, it may just be quiet.
			else if (answer[1] !== copy.lastEventId || !stream.opened) this.#distrust(answer);
		} catch { /* What is wrong shows at the stream itself. */
		} finally {
			this.#doubting = false;
		}
	}

	/**
	 * One that spoke may have died without a word, or its last words wait in the proxy for more to come: what they
	 * are is known now, and another stream tells which it is. One that never spoke is held back.
	 * @type {(answer: any[]) => void}
	 */
	#distrust([page, id]) {
		const { stream, copy } = this.#connection;
		if (stream.spoke && !this.#suspected) {
			copy.receive("snapshot", page, id);
			return this.#connection.open();
		}
		this.#suspected = true;
		warn("Nothing arrives on the event stream although plain requests are answered: a proxy buffers it. Turn that off " +
			"(nginx: proxy_buffering off, or let X-Accel-Buffering pass; see docs/guides/deploy.md). Until then the thread is " +
			"asked for every few seconds.");
		this.#connection.startPolling();
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The connection: put together
// ---------------------------------------------------------------------------------------------------------------------

/**
 * One thread on its way to the page, for all its subscribers. It goes one way at a time:
 *
 *   stream    open; a new one with the last event id, after a wait, whenever it fails
 *   polling   the watchdog found that a proxy holds the stream back: the newest page is asked for, and a stream is
 *             tried beside it once a minute, until one speaks
 *   paused    the tabs decided that this one lets go: asked for only while a run's end is waited for
 */
class ThreadConnection {
	#server;
	#tabs;
	#path;
	/** Called when it is closed. */
	#onclose;
	#subscribers;
	#tools;
	#watchdog;
	#timer;
	/** Aborted when it is closed. */
	#closed = new AbortController();
	/** Aborted when another way is taken. */
	#way = new AbortController();
	#paused = false;
	/** How many tries the present outage took, and since when it lasts. */
	#outage = { tries: 0, since: 0 };
	/** Seen by the watchdog. */
	polling = false;
	copy;
	stream;

	/**
	 * @param {string} thread_id @param {Server} server @param {Tabs} tabs
	 * @param {(connection: ThreadConnection) => void} onclose
	 */
	constructor(thread_id, server, tabs, onclose) {
		this.#path = threadPath(thread_id);
		this.#server = server;
		this.#tabs = tabs;
		this.#onclose = onclose;
		this.copy = new ThreadCopy({
			older: (id) => server.get(`${this.#path}/messages?limit=200&before=${id}`, this.#closed.signal),
			progress: () => this.#recovered(),
			changed: (urgent) => this.#subscribers.changed(urgent),
			restart: () => this.#retry(),
			end: (error) => this.#end(error),
		});
		this.#tools = new PageTools(server, this.#path, (name) => this.#subscribers.tool(name));
		this.#subscribers = new Subscribers(
			this.copy.entries, server.clock, () => this.#tools.look(this.entries.waiting.values()));
		this.stream = new EventStream(server, {
			opened: () => this.#opened(),
			// The browser itself gives up at a 502.
			failed: () => (this.polling ? this.stream.close() : this.#retry()),
			ping: () => this.#recovered(),
			spoke: () => this.#spoke(),
			event: (name, data, id) => this.copy.receive(name, data, id),
		});
		this.#watchdog = new Watchdog(this, server);
		this.#timer = setInterval(() => this.#watchdog.look(), 5e3);
		onBack(() => {
			this.#subscribers.lookedAt();
			this.#watchdog.lookedAt();
		}, this.#closed.signal);
		// One that is kept for the back button goes on where it was, in the midst of a function.
		globalThis.addEventListener?.("pagehide", ({ persisted }) => persisted === false && this.#tools.letGo(),
			this.#closed);
		tabs.enter(this.#hold);
		if (!this.#paused) this.open();
	}

	get entries() {
		return this.copy.entries;
	}

	/** Gives what ends the subscription. @type {(subscriber: Subscriber) => () => void} */
	subscribe(subscriber) {
		this.#subscribers.add(subscriber);
		return () => {
			this.#subscribers.remove(subscriber);
			// Later: React's StrictMode comes back at once.
			setTimeout(() => this.#subscribers.count || this.#close());
		};
	}

	/** Aborted when another way is taken. */
	get way() {
		return this.#way.signal;
	}

	/** @type {(limit: number) => string} */
	newest(limit) {
		return `${this.#path}/messages?limit=${limit}`;
	}

	/** Opens a stream, in the place of whatever there was. */
	open() {
		this.#next();
		this.#subscribers.setState("connecting");
		this.#openStream();
	}

	/** Asks instead of listening, until a stream speaks. */
	startPolling() {
		this.polling = true;
		this.#poll();
	}

	/** Ends the present way, and gives the signal of the next one. */
	#next() {
		this.#way.abort();
		this.stream.close();
		return (this.#way = new AbortController()).signal;
	}

	#openStream() {
		const { lastEventId } = this.copy;
		this.stream.open(`${this.#path}/events${lastEventId && `?last_event_id=${lastEventId}`}`);
	}

	#opened() {
		// A stream that goes on from a place may have nothing to say for a while.
		if (this.copy.lastEventId && !this.polling) this.#subscribers.setState("live");
	}

	/** The stream's bytes arrive: nothing else is needed. */
	#spoke() {
		if (this.polling) {
			this.polling = false;
			// Ends the polls, not the stream.
			this.#way.abort();
			this.#way = new AbortController();
		}
		this.#subscribers.setState("live");
	}

	#recovered() {
		this.#outage = { tries: 0, since: 0 };
	}

	/** Opens another stream, after a wait. Without one, the polls go on. */
	async #retry() {
		if (!this.stream.active) return;
		const { opened } = this.stream, signal = this.#next(), { clock } = this.#server;
		this.#outage.since ||= clock();
		this.#subscribers.setState("connecting");
		try {
			// EventSource hides why it failed: this waits for the server or throws.
			if (!opened) await this.#ask(1, signal);
			this.#subscribers.setState("connecting");
			const wait = backoff(this.#outage.tries++, clock() - this.#outage.since);
			await this.#server.sleep(wait, signal);
			if (!signal.aborted) this.open();
		} catch (error) {
			if (!signal.aborted) this.#end(error);
		}
	}

	/**
	 * The newest messages, once there is an answer. A session that ended is waited out where the thread was shown
	 * before: who signs in again, in whatever tab, goes on where they were.
	 * @type {(limit: number, signal: AbortSignal) => Promise<any[]>}
	 */
	async #ask(limit, signal) {
		const { clock } = this.#server;
		for (let refused = 0, since = clock(); ; refused++) {
			try {
				const found = await this.#server.get(this.newest(limit), signal);
				if (signal.aborted) throw abortError();
				return found;
			} catch (/** @type {any} */ error) {
				if (signal.aborted || !this.copy.loaded || error.code !== "unauthenticated") throw error;
			}
			warn("The server does not know the user any more (401): the session is over. The thread goes on once they " +
				"have signed in again.");
			this.#subscribers.setState("unauthenticated");
			await this.#server.sleep(backoff(refused, clock() - since), signal);
		}
	}

	/** Lets go of the stream for other tabs, or takes it up where it was. */
	#hold = (/** @type {boolean} */ on) => {
		if (on === this.#paused) return;
		this.#paused = on;
		if (on) this.#poll(this.copy.loaded ? this.#pace() : 0);
		else if (this.polling) this.#poll();
		else this.open();
	};

	/** Asks, instead of listening, or while other tabs listen. */
	async #poll(wait = 0) {
		const signal = this.#next(), { clock } = this.#server;
		const state = this.#paused ? "paused" : "polling";
		let tried = clock();
		this.#subscribers.setState(state);
		for (; ; wait = this.#pace()) {
			await this.#server.sleep(wait, signal);
			if (signal.aborted) return;
			if (this.#paused && this.copy.loaded && !this.#running) continue;
			if (!this.#paused && !this.stream.active && clock() - tried > 60e3) {
				tried = clock();
				this.#openStream();
			}
			try {
				const [page, id] = await this.#ask(50, signal);
				this.#subscribers.setState(state);
				await this.copy.refresh(page, id);
			} catch (error) {
				if (!signal.aborted) this.#end(error);
				return;
			}
		}
	}

	/** Milliseconds until the next poll. */
	#pace() {
		if (this.#running) return isHidden() ? 5e3 : 2e3;
		return isHidden() ? 60e3 : 10e3;
	}

	get #running() {
		return this.#subscribers.waits || this.entries.running;
	}

	#end(/** @type {any} */ error) {
		if (this.#closed.signal.aborted) return;
		this.#close();
		if (this.#subscribers.shows && error.code === "thread_not_found") this.copy.clear();
		this.#subscribers.end(error);
	}

	#close() {
		this.copy.stop();
		this.#tools.look([]);
		this.#onclose(this);
		this.#closed.abort();
		clearInterval(this.#timer);
		this.#tabs.leave(this.#hold);
		this.#next();
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The commands
// ---------------------------------------------------------------------------------------------------------------------

/**
 * Starts runs, and resolves when all are over.
 * @type {(server: Server, connect: (thread_id: string) => ThreadConnection, thread_id: string, assistant_ids: string[],
 *   set: any, options?: any) => Promise<Run[]>}
 */
const startRuns = (server, connect, thread_id, assistant_ids, set, { signal, onstate, tools, ...body } = {}) =>
	new Promise((resolve, reject) => {
		const path = `${threadPath(thread_id)}/runs`;
		need(set == null || typeof set === "function", "set must be a function or null", set);
		need(Array.isArray(assistant_ids) && assistant_ids.every((id) => id && typeof id === "string"),
			"assistant ids must be non-empty strings", assistant_ids);
		if (signal?.aborted) throw abortError();

		/** As they were seen last. @type {Run[]} */
		let runs = [];
		let leave = () => {};

		/** It stays subscribed, so that `set` sees how the runs end. */
		const cancel = () => {
			reject(abortError(runs));
			for (const run of runs)
				if (!isOver(run)) server.post(`${path}/${run.id}/cancel`, {}).catch(() => {});
		};

		/** @type {(error: any) => void} */
		const fail = (error) => {
			leave();
			reject(failure(error.code, error.message, { ...error, runs }));
		};

		/** @type {(started: Run[], entries: ThreadEntries) => void} */
		const seen = (started, entries) => {
			if (runs.some((run, i) => run !== started[i] && !entries.has(run.id)))
				return fail({ code: "run_not_found", message: "The run was deleted" });
			runs = runs.map((run) => entries.run(run.id) ?? run);
			if (!runs.every(isOver)) return;
			const failed = runs.find(({ status }) => status === "failed");
			if (failed) return fail({ ...failed.last_error });
			leave();
			resolve(runs);
		};

		signal?.addEventListener("abort", cancel);
		// Without the signal: what the server may have started is cancelled once its answer says which runs it is.
		server.post(path, { assistant_ids, ...body }).then(([answer]) => {
			const started = runs = answer.runs;
			const connection = connect(thread_id);
			leave = connection.subscribe(
				{ set, seen: () => seen(started, connection.entries), fail, onstate, tools, waits: true });
			if (signal?.aborted) cancel();
		}).catch(fail);
	});

/**
 * For a copy of this file: `baseUrl` is where the blueprint is.
 * @param {{baseUrl?: string, fetch?: typeof fetch, EventSource?: typeof EventSource}} [options]
 */
export const createAssistream = (options = {}) => {
	const server = new Server(options);
	const tabs = new Tabs(server);
	/** @type {Map<string, ThreadConnection>} */
	const connections = new Map();

	/** All subscribers of a thread share a connection. @type {(thread_id: string) => ThreadConnection} */
	const connect = (thread_id) => {
		const known = connections.get(thread_id);
		if (known) return known;
		const made = new ThreadConnection(thread_id, server, tabs, (closed) => {
			// Who leaves one that has ended may do so when the next is there.
			if (connections.get(thread_id) === closed) connections.delete(thread_id);
		});
		connections.set(thread_id, made);
		return made;
	};

	/** @type {(thread_id: string, assistant_ids: string[], set: any, options?: any) => Promise<Run[]>} */
	const start = (thread_id, assistant_ids, set, options) =>
		startRuns(server, connect, thread_id, assistant_ids, set, options);

	/** @type {(thread_id: string, run_id: string, call_id: string, approve: boolean, options?: any) => Promise<Run>} */
	const decide = async (thread_id, run_id, tool_call_id, approve, { signal, ...more } = {}) => {
		const approvals = [{ tool_call_id, approve, ...more }];
		return (await server.post(`${runPath(thread_id, run_id)}/approvals`, { approvals }, signal))[0];
	};

	return {
		/**
		 * Calls `set` now and on every change, with the whole thread as a new array, once a frame at most. An entry that
		 * did not change is the same object as before: never modify them. Resolves after the first `set`; `signal` ends
		 * it.
		 * @type {(thread_id: string, set: Setter, options?: StreamOptions) => Promise<Entry[]>}
		 */
		loadThread: (thread_id, set, { signal, onstate, tools } = {}) =>
			new Promise((resolve, reject) => {
				need(typeof set === "function", "set must be a function", set);
				if (signal?.aborted) throw abortError();
				const leave = connect(thread_id).subscribe({ set, seen: resolve, fail: reject, onstate, tools });
				signal?.addEventListener("abort", () => { leave(); reject(abortError()); });
			}),

		/** @type {(thread_id: string, content: string, options?: Options) => Promise<Entry>} */
		addMessage: async (thread_id, content, { signal } = {}) =>
			(await server.post(`${threadPath(thread_id)}/messages`, { content }, signal))[0],

		/**
		 * Resolves when it is over; `signal` cancels it.
		 * @type {(thread_id: string, assistant_id: string, set?: Setter | null, options?: StreamOptions) => Promise<Run>}
		 */
		run: async (thread_id, assistant_id, set, options) =>
			(await start(thread_id, [assistant_id], set, options))[0],

		/**
		 * @type {(thread_id: string, content: string, assistant_id: string, set?: Setter | null,
		 *   options?: StreamOptions) => Promise<Run>}
		 */
		addMessageAndRun: async (thread_id, content, assistant_id, set, options) =>
			(await start(thread_id, [assistant_id], set, { ...options, content }))[0],

		/**
		 * @type {(thread_id: string, content: string, assistant_ids: string[], set?: Setter | null,
		 *   options?: StreamOptions & {mode?: "parallel" | "sequential"}) => Promise<Run[]>}
		 */
		addMessageAndRuns: (thread_id, content, assistant_ids, set, options) =>
			start(thread_id, assistant_ids, set, { ...options, content }),

		/** @type {(metadata?: object, options?: Options) => Promise<string>} */
		createThread: async (metadata, { signal } = {}) => (await server.post("threads", { metadata }, signal))[0].id,

		/**
		 * The user's own threads, newest first: those made before the thread `before`, `limit` of them.
		 * @type {(options?: Options & {limit?: number, before?: string}) => Promise<{data: Thread[], has_more: boolean}>}
		 */
		listThreads: async ({ signal, ...wanted } = {}) => {
			const given = Object.entries(wanted).filter(([, value]) => value != null);
			const query = new URLSearchParams(/** @type {any} */ (given));
			return (await server.command("GET", `threads${given.length ? `?${query}` : ""}`, signal))[0];
		},

		/**
		 * Resolves when the thread is gone, with all that is in it. Who shows it gets an empty array.
		 * @type {(thread_id: string, options?: Options) => Promise<void>}
		 */
		deleteThread: async (thread_id, { signal } = {}) => {
			await server.command("DELETE", threadPath(thread_id), signal);
		},

		/** @type {(options?: Options) => Promise<Assistant[]>} */
		listAssistants: async ({ signal } = {}) => (await server.command("GET", "assistants", signal))[0].data,

		/**
		 * Cancels a run, whoever started it, and resolves with it; one that is over stays as it is.
		 * @type {(thread_id: string, run_id: string, options?: Options) => Promise<Run>}
		 */
		cancelRun: async (thread_id, run_id, { signal } = {}) => {
			return (await server.post(`${runPath(thread_id, run_id)}/cancel`, {}, signal))[0];
		},

		/**
		 * Answers tool calls that wait for the page's output, all or none, and resolves with the run; the last answer has
		 * it go on. An output that is no string is sent as JSON. Rejects with the code `already_answered`, and how, where
		 * a call was answered before.
		 * @type {(thread_id: string, run_id: string, outputs: {tool_call_id: string, output: any}[], options?: Options) =>
		 *   Promise<Run>}
		 */
		submitToolOutputs: async (thread_id, run_id, outputs, { signal } = {}) => {
			need(Array.isArray(outputs), "outputs must be a list of {tool_call_id, output}", outputs);
			const tool_outputs = outputs.map((one) => ({ ...one, output: outputText(one.output) }));
			return (await server.post(`${runPath(thread_id, run_id)}/submit_tool_outputs`, { tool_outputs }, signal))[0];
		},

		/**
		 * Allows a tool call, with other `arguments` where they are given; `remember` allows its tool for the rest of the
		 * thread. Resolves and rejects as `submitToolOutputs` does.
		 * @type {(thread_id: string, run_id: string, call_id: string,
		 *   options?: Options & {arguments?: object, remember?: boolean}) => Promise<Run>}
		 */
		approve: (thread_id, run_id, call_id, options) => decide(thread_id, run_id, call_id, true, options),

		/**
		 * Does not allow a tool call; the model is told the reason. Resolves and rejects as `submitToolOutputs` does.
		 * @type {(thread_id: string, run_id: string, call_id: string, options?: Options & {reason?: string}) => Promise<Run>}
		 */
		deny: (thread_id, run_id, call_id, options) => decide(thread_id, run_id, call_id, false, options),
	};
};

/**
 * What an entry says: its texts and refusals, a blank line between two. Joined without, two messages of one answer
 * would be one sentence.
 * @type {(entry: Entry) => string}
 */
export const text = (entry) =>
	entry.message.content
		.map((/** @type {any} */ part) => part.text?.value ?? part.refusal)
		.filter(Boolean).join("\n\n");

/**
 * What an entry consists of, in the order in which it happened: texts, refusals, reasoning and tool calls. `key` stays
 * the same while a part grows.
 * @type {(entry: Entry) => ({key: string, type: "text" | "refusal", part: Part} |
 *   {key: string, type: "reasoning", text: string, step: Step} |
 *   {key: string, type: "tool_call", call: ToolCall, step: Step})[]}
 */
export const parts = ({ message, steps }) => {
	/** @type {any[]} */
	const found = [];
	/** @type {(until: number) => void} */
	const addSteps = (until) => {
		for (; at < steps.length && (steps[at].content_index ?? 0) <= until; at++) {
			const step = steps[at], { reasoning, tool_calls } = step.step_details;
			if (reasoning) found.push({ key: step.id, type: "reasoning", text: reasoning.text, step });
			for (const call of tool_calls ?? []) found.push({ key: call.id, type: "tool_call", call, step });
		}
	};
	let at = 0;
	message.content.forEach((part, index) => {
		addSteps(index);
		found.push({ key: `${message.run_id ?? message.id}-${index}`, type: part.type, part });
	});
	addSteps(Infinity);
	return found;
};

// ---------------------------------------------------------------------------------------------------------------------
// The exports: for the blueprint that this file was loaded from
// ---------------------------------------------------------------------------------------------------------------------

export const {
	loadThread, addMessage, run, addMessageAndRun, addMessageAndRuns,
	createThread, listThreads, deleteThread, listAssistants, cancelRun,
	submitToolOutputs, approve, deny,
} = createAssistream();
