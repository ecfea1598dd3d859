/**
 * `set` gets the whole thread as a new array, once a frame at most; an entry that did not change is the same
 * object as before. Never modify them.
 *
 * @typedef {{type: "text", text: {value: string, annotations: any[]}} |
 *   {type: "refusal", refusal: string}} Part
 * @typedef {{id: string, created_at: number, role: "user" | "assistant", content: Part[],
 *   status: "in_progress" | "completed" | "incomplete", incomplete_details: {reason: string} | null,
 *   assistant_id: string | null, run_id: string | null, metadata: Record<string, any>,
 *   [more: string]: any}} Message
 * @typedef {{id: string, status: "queued" | "in_progress" | "requires_action" | "completed" | "incomplete" |
 *   "failed" | "cancelled", last_error: {code: string, message: string} | null, [more: string]: any}} Run
 * @typedef {{assistant_id: string | null, message: Message, run: Run | null, steps: any[]}} Entry
 * @typedef {(entries: Entry[]) => void} Setter
 * @typedef {{signal?: AbortSignal}} Options
 * @typedef {Error & {code: string, status?: number, runs?: Run[]}} AssistreamError
 */

const EVENTS =
	"snapshot deleted message.created message.delta message.completed message.incomplete run.created " +
	"run.queued run.in_progress run.requires_action run.completed run.incomplete run.failed run.cancelled " +
	"run.step.created run.step.delta run.step.completed";

const over = ({ status = "" }) => /complete|failed|cancelled/.test(status);

const failure = (code = "", message = "", more = {}) => Object.assign(new Error(message), { code, ...more });

/** @param {Run[]} [runs] */
const abortError = (runs) => Object.assign(new DOMException("Aborted", "AbortError"), { runs });

/** @type {(ok: any, rule: string, got: any) => void} */
const need = (ok, rule, got) => {
	if (!ok) throw new TypeError(`${rule}, got ${JSON.stringify(got)}`);
};

/** @type {(a: any, b: any) => boolean} */
const equal = (a, b) =>
	a === b ||
	(a && b && typeof a === "object" && Object.keys(a).length === Object.keys(b).length &&
		Object.keys(a).every((key) => equal(a[key], b[key])));

/** @type {(id: any) => any[]} epoch, offset */
const place = (id) => [id.split("-")[0], +id.split("-")[1]];

const backoff = (tries = 0) => Math.min(15e3, 500 * 2 ** tries) * (0.5 + Math.random() / 2);

/** @type {(back: () => void, signal: AbortSignal) => void} */
const onBack = (back, signal) => {
	for (const type of ["online", "pageshow", "visibilitychange"])
		globalThis.addEventListener?.(type, () => (type[0] === "v" && document.hidden) || back(), { signal });
};

/** @type {(ms: number, signal?: AbortSignal) => Promise<any>} */
const sleep = (ms, signal) =>
	new Promise((resolve) => {
		const off = new AbortController();
		const done = () => { off.abort(); clearTimeout(timer); resolve(0); };
		const timer = setTimeout(done, signal?.aborted ? 0 : ms);
		onBack(done, off.signal);
		signal?.addEventListener("abort", done, off);
	});

/**
 * For a copy of this file: `baseUrl` is where the blueprint is.
 * @param {{baseUrl?: string, fetch?: typeof fetch, EventSource?: typeof EventSource}} [options]
 */
export const createAssistream = (options = {}) => {
	/** @typedef {{entry: Entry, at: number, i: number}} Slot exact as of `at` */
	/** @typedef {(set: any, seen: (shown: any, slots: any) => void, fail: (error: any) => void) =>
	 *   () => void} Join gives what leaves */
	/** @type {Map<string, Join>} */
	const threads = new Map();

	const url = (path = "") => {
		const { baseUrl } = options;
		const base = baseUrl == null ? import.meta.url : globalThis.document?.baseURI;
		return new URL((baseUrl ?? ".").replace(/\/*$/, "/") + path, base).href;
	};

	/** @type {(id: string) => string} */
	const at = (id) => {
		need(id && typeof id === "string", "thread_id must be a non-empty string", id);
		return `threads/${encodeURIComponent(id)}/`;
	};

	/**
	 * Tries until there is an answer: a GET for ever, a POST (which has a body) for minutes, under one key.
	 * @type {(path: string, body?: object, signal?: AbortSignal) => Promise<any[]>} answer, place
	 */
	const call = async (path, body, signal) => {
		const post = body && {
			method: "POST",
			body: JSON.stringify(body),
			headers: {
				"Content-Type": "application/json",
				// randomUUID needs a secure context.
				"Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-"),
			},
		};
		const href = url(path);
		for (let tries = 0; ; tries++) {
			let error, final, after = 0;
			if (signal?.aborted) throw abortError();
			try {
				const until = (post && signal) || AbortSignal.timeout(60e3);
				const response = await (options.fetch ?? fetch)(
					href, { credentials: "same-origin", ...post, signal: until });
				const { ok, status, headers } = response;
				const answer = await response.json().catch((error) => { if (ok) throw error; });
				if (ok) return [answer, headers.get("Last-Event-ID")];
				error = failure(`http_${status}`, `The server answered ${status}`, { status, ...answer?.error });
				after = parseFloat(headers.get("Retry-After") ?? "");
				// Without our error it is some proxy's word.
				final = ![408, 429, 502, 503, 504].includes(status) && (post || (status < 500 && answer?.error));
				if (post && status === 429) final = !(after <= 5) || tries > 3;
			} catch (reason) {
				error = failure("network_error", `No answer: ${reason}`);
				// What is sent offline waits.
				if (globalThis.navigator?.onLine === false) tries = Math.min(tries, 5);
			}
			if (final || (post && tries > 20)) throw error;
			await sleep(Math.max(backoff(tries), after * 1e3 || 0), signal);
		}
	};

	/** One thread's stream, for all its users. */
	const follow = (thread_id = "") => {
		const path = at(thread_id);
		const users = /** @type {Set<any>} */ (new Set());
		/** @type {Map<Setter, Entry[]>} what each `set` got last */
		const got = new Map();
		/** @type {Slot[]} */
		let list = [];
		/** @type {Map<string, Slot>} by message id and by run id */
		let slots = new Map();
		/** @type {any[]} events before their entry */
		let early = [];
		/** @type {Entry[]} */
		let shown = [];
		/** Shown last, by message id. */
		const known = new Map();
		/** Not yet in a `set`: free to change. */
		const owned = new Set();
		const off = new AbortController();
		let opened = false, last = "", epoch = "", offset = 0, since = 0, turn = 0, tries = 0, heard = 0;
		let [source, ended, due, changed] = /** @type {any[]} */ ([]);

		const open = () => {
			source?.close();
			source = new (options.EventSource ?? EventSource)(
				url(`${path}events${last && `?last_event_id=${last}`}`));
			const hear = () => { heard = Date.now(); };
			hear();
			opened = false;
			source.onopen = () => { opened = true; };
			// The browser itself gives up at a 502.
			source.onerror = retry;
			source.addEventListener("ping", () => { tries = 0; hear(); });
			for (const name of EVENTS.split(" "))
				source.addEventListener(`thread.${name}`, (/** @type {MessageEvent} */ event) => {
					hear();
					receive(name, JSON.parse(event.data), event.lastEventId);
				});
		};

		const retry = async () => {
			if (!source) return;
			source = source.close();
			try {
				// EventSource hides why it failed: this waits for the server or throws.
				if (!opened) await call(`${path}messages?limit=1`, undefined, off.signal);
				await sleep(backoff(tries++), off.signal);
				if (!off.signal.aborted) open();
			} catch (error) {
				end(error);
			}
		};

		/** Asks for a snapshot. */
		const restart = () => {
			last = "";
			retry();
		};

		/** @type {(name: string, data: any, id: any) => void} */
		const receive = (name, data, id) => {
			if (name === "deleted") return end(failure("thread_not_found", "The thread was deleted"));
			const [from, at] = place(id);
			if (name === "snapshot") {
				list = [];
				slots = new Map();
				early = [];
				changed = null;
				epoch = from;
				since = at;
				prepend(data.data, at);
				load(data.has_more);
			} else {
				if (from !== epoch || at > offset + 1) return restart();
				if (at <= offset) return;
				tries = 0;
				apply(name, data, at);
			}
			last = id;
			offset = at;
			schedule();
		};

		const load = async (more = false) => {
			const mine = ++turn;
			try {
				while (more && !meets()) {
					const [page, id] = await call(
						`${path}messages?limit=200&before=${list[0].entry.message.id}`, undefined, off.signal);
					if (mine !== turn) return;
					const [from, at] = place(id);
					if (from !== epoch || at < since) return restart();
					prepend(page.data, at);
					more = page.has_more && page.data[0];
				}
				tries = 0;
				complete();
			} catch (/** @type {any} */ error) {
				if (mine !== turn) return;
				if (error.code === "message_not_found") restart();
				else end(error);
			}
		};

		/** Nothing is shown before it. */
		const complete = () => {
			list.forEach((slot, i) => { slot.i = i; });
			changed = new Set(list);
			schedule();
		};

		/** Joins what is known and final. */
		const meets = () => {
			const i = shown.indexOf(known.get(list[0].entry.message.id));
			const older = shown.slice(0, i);
			if (i < 0 || !older.every(({ message, run }) => [message, run ?? message].every(over))) return false;
			prepend(older, 0);
			return true;
		};

		/** @type {(entries: Entry[], at: number) => void} */
		const prepend = (entries, at) => {
			list = [...entries.map((entry) => add(entry, at)), ...list];
			replay();
		};

		/** @type {(entry: Entry, at: number) => Slot} */
		const add = (entry, at) => {
			const { id, run_id } = entry.message, was = known.get(id);
			const slot = { entry: equal(entry, was) ? was : entry, at, i: list.length };
			slots.set(id, slot).set(run_id ?? id, slot);
			return slot;
		};

		const replay = () => { for (const [name, data, at] of early.splice(0)) apply(name, data, at); };

		/** @type {(name: string, data: any, id: any) => void} */
		const apply = (name, data, at) => {
			const [kind, what, step] = name.split(".");
			const key = step ? data.run_id : data.id;
			if (name === "message.created" && !slots.has(key)) {
				list.push(add({ assistant_id: data.assistant_id, message: data, run: null, steps: [] }, 0));
				replay();
			}
			const slot = slots.get(key);
			if (!slot) {
				// Its page or its message is on the way.
				if (!changed || kind === "run") early.push([name, data, at]);
				return;
			}
			if (at <= slot.at) return;
			changed?.add(slot);
			const entry = own(slot, "entry");
			if (step) {
				const steps = own(entry, "steps");
				let i = steps.findIndex((/** @type {any} */ { id }) => id === data.id);
				if (i < 0) i = steps.length;
				if (step === "delta") merge(own(steps, i), data.delta);
				else steps[i] = data;
			} else if (what === "delta") merge(own(entry, kind), data.delta);
			else entry[kind] = data;
		};

		/** @type {(holder: any, key: string | number) => any} */
		const own = (holder, key) => {
			const value = holder[key];
			if (!owned.has(value)) owned.add((holder[key] = Array.isArray(value) ? [...value] : { ...value }));
			return holder[key];
		};

		/** @type {(target: any, delta: object) => void} */
		const merge = (target, delta) => {
			for (const [key, value] of Object.entries(delta)) {
				if (Array.isArray(value)) {
					const items = own(target, key);
					if (key === "annotations") items.push(...value);
					else for (const { index, ...part } of value) merge(own(items, index), part);
				} else if (value && typeof value === "object") {
					if (key === "text") target.text ??= { value: "", annotations: [] };
					merge(own(target, key), value);
				} else {
					const grows = /^(value|text|refusal|arguments|output)$/.test(key);
					target[key] = grows ? (target[key] ?? "") + value : value;
				}
			}
		};

		const schedule = () => {
			if (due) return;
			// In a tab that is hidden before the frame, none comes.
			due = setTimeout(flush, 200);
			if (globalThis.document?.visibilityState === "visible") requestAnimationFrame(flush);
			else queueMicrotask(flush);
		};

		const flush = () => {
			if (!due) return;
			due = clearTimeout(due);
			if (changed) {
				const now = shown.slice(0, list.length);
				let same = list.length === shown.length;
				for (const slot of changed) {
					const { entry, i } = slot, { id } = entry.message, was = known.get(id);
					now[i] = slot.entry = equal(entry, was) ? was : entry;
					known.set(id, now[i]);
					same &&= now[i] === shown[i];
				}
				owned.clear();
				changed.clear();
				if (!same) shown = now;
				for (const { set } of users) {
					if (!set || got.get(set) === shown) continue;
					// A copy, as `set` may have got this array before it left.
					const array = got.has(set) ? shown : [...shown];
					got.set(set, shown);
					try {
						set(array);
					} catch (error) {
						reportError(error);
					}
				}
			}
			for (const user of users)
				if (ended) user.fail(ended);
				else if (changed) user.seen(shown, slots);
		};

		/** @type {(error: any) => void} */
		const end = (error) => {
			if (off.signal.aborted) return;
			close();
			ended = error;
			if (got.size && error.code === "thread_not_found") {
				list = [];
				complete();
			}
			schedule();
		};

		const close = () => {
			turn++;
			if (threads.get(thread_id) === join) threads.delete(thread_id);
			off.abort();
			clearInterval(watch);
			source = source?.close();
		};

		/** @type {Join} */
		const join = (set, seen, fail) => {
			const user = { set, seen, fail };
			users.add(user);
			schedule();
			return () => {
				users.delete(user);
				if (set && ![...users].some((user) => user.set === set)) got.delete(set);
				// Later: React's StrictMode comes back at once.
				setTimeout(() => users.size || close());
			};
		};

		const check = (silence = 40e3) => { if (source && Date.now() - heard > silence) open(); };

		open();
		const watch = setInterval(check, 5e3);
		onBack(() => check(opened ? 20e3 : 2e3), off.signal);
		threads.set(thread_id, join);
		return join;
	};

	const join = (id = "") => threads.get(id) ?? follow(id);

	/** @type {(thread_id: string, assistant_ids: string[], set: any, options?: any) => Promise<Run[]>} */
	const start = (thread_id, assistant_ids, set, { signal, ...body } = {}) =>
		new Promise((resolve, reject) => {
			const path = `${at(thread_id)}runs`;
			need(set == null || typeof set === "function", "set must be a function or null", set);
			need(Array.isArray(assistant_ids) && assistant_ids.every((id) => id && typeof id === "string"),
				"assistant ids must be non-empty strings", assistant_ids);
			if (signal?.aborted) throw abortError();
			/** @type {Run[]} */
			let runs = [];
			let leave = () => {};
			const cancel = () => {
				reject(abortError(runs));
				for (const run of runs)
					if (!over(run)) call(`${path}/${run.id}/cancel`, {}).catch(() => {});
			};
			/** @type {(error: any) => void} */
			const fail = (error) => {
				leave();
				reject(failure(error.code, error.message, { ...error, runs }));
			};
			signal?.addEventListener("abort", cancel);
			call(path, { assistant_ids, ...body }).then(([answer]) => {
				runs = answer.runs;
				leave = join(thread_id)(set, (_, slots) => {
					if (runs.some((run, i) => run !== answer.runs[i] && !slots.has(run.id)))
						return fail({ code: "run_not_found", message: "The run was deleted" });
					runs = runs.map((run) => slots.get(run.id)?.entry.run ?? run);
					if (!runs.every(over)) return;
					const failed = runs.find(({ status }) => status === "failed");
					if (!failed) resolve(runs);
					fail({ ...failed?.last_error });
				}, fail);
				// Aborted during the POST.
				if (signal?.aborted) cancel();
			}).catch(fail);
		});

	return {
		/**
		 * Resolves after the first `set`; `signal` ends it.
		 * @type {(thread_id: string, set: Setter, options?: Options) => Promise<Entry[]>}
		 */
		loadThread: (thread_id, set, { signal } = {}) =>
			new Promise((resolve, reject) => {
				need(typeof set === "function", "set must be a function", set);
				if (signal?.aborted) throw abortError();
				const leave = join(thread_id)(set, resolve, reject);
				signal?.addEventListener("abort", () => { leave(); reject(abortError()); });
			}),

		/** @type {(thread_id: string, content: string, options?: Options) => Promise<Entry>} */
		addMessage: async (thread_id, content, { signal } = {}) =>
			(await call(`${at(thread_id)}messages`, { content }, signal))[0],

		/**
		 * Resolves when it is over; `signal` cancels it.
		 * @type {(thread_id: string, assistant_id: string, set?: Setter | null, options?: Options) => Promise<Run>}
		 */
		run: async (thread_id, assistant_id, set, options) =>
			(await start(thread_id, [assistant_id], set, options))[0],

		/**
		 * @type {(thread_id: string, content: string, assistant_id: string, set?: Setter | null,
		 *   options?: Options) => Promise<Run>}
		 */
		addMessageAndRun: async (thread_id, content, assistant_id, set, options) =>
			(await start(thread_id, [assistant_id], set, { ...options, content }))[0],

		/**
		 * @type {(thread_id: string, content: string, assistant_ids: string[], set?: Setter | null,
		 *   options?: Options & {mode?: "parallel" | "sequential"}) => Promise<Run[]>}
		 */
		addMessageAndRuns: (thread_id, content, assistant_ids, set, options) =>
			start(thread_id, assistant_ids, set, { ...options, content }),

		/** @type {(metadata?: object, options?: Options) => Promise<string>} */
		createThread: async (metadata, { signal } = {}) => (await call("threads", { metadata }, signal))[0].id,
	};
};

/** @type {(entry: Entry) => string} */
export const text = (entry) =>
	entry.message.content.map((part) => (part.type === "text" ? part.text.value : part.refusal)).join("");

export const { loadThread, addMessage, run, addMessageAndRun, addMessageAndRuns, createThread } =
	createAssistream();
