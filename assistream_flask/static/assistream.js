/**
 * assistream in the page: `set` gets the whole thread whenever it changed: once a frame at most, never the same
 * array twice, and an entry that did not change is the same object as before. Don't modify what it gets.
 *
 * @typedef {{type: "text", text: {value: string, annotations: any[]}} | {type: "refusal", refusal: string}} Part
 * @typedef {{id: string, object: string, created_at: number, thread_id: string, role: "user" | "assistant",
 *   status: "in_progress" | "completed" | "incomplete", content: Part[], assistant_id: string | null,
 *   run_id: string | null, completed_at: number | null, incomplete_at: number | null,
 *   incomplete_details: {reason: string} | null, metadata: Record<string, any>}} Message
 * @typedef {{id: string, assistant_id: string, status: "queued" | "in_progress" | "requires_action" |
 *   "completed" | "incomplete" | "failed" | "cancelled", last_error: {code: string, message: string} | null,
 *   [more: string]: any}} Run
 * @typedef {{assistant_id: string | null, message: Message, run: Run | null,
 *   steps: {id: string, type: string, status: string, step_details: any, [more: string]: any}[]}} Entry
 * @typedef {(entries: Entry[]) => void} Setter
 * @typedef {{signal?: AbortSignal}} Options
 * @typedef {Error & {code: string, status?: number, runs?: Run[]}} AssistreamError what promises reject with
 */

const EVENTS =
	"snapshot deleted message.created message.delta message.completed message.incomplete run.created run.queued " +
	"run.in_progress run.requires_action run.completed run.incomplete run.failed run.cancelled run.step.created " +
	"run.step.delta run.step.completed";

/** @param {{status: string}} thing a message or a run */
const over = ({ status }) => /^(completed|incomplete|failed|cancelled)$/.test(status);

/** @param {string} code @param {string} message @param {object} [more] @returns {AssistreamError} */
const failure = (code, message, more) => Object.assign(new Error(message), { code, ...more });

/** @param {AbortSignal} [signal] @param {Run[]} [runs] */
const abortError = (signal, runs) =>
	signal?.reason instanceof Error && !runs
		? signal.reason
		: Object.assign(new DOMException("The operation was aborted", "AbortError"), { runs });

/** @param {unknown} ok @param {string} rule @param {unknown} got */
const need = (ok, rule, got) => {
	if (!ok) throw new TypeError(`${rule}, got ${typeof got === "string" ? JSON.stringify(got) : String(got)}`);
};

/** @param {any} a @param {any} b @returns {boolean} whether two JSON values are equal */
const equal = (a, b) =>
	a === b ||
	(!!a && !!b && typeof a === "object" && typeof b === "object" &&
		Object.keys(a).length === Object.keys(b).length &&
		Object.keys(a).every((key) => equal(a[key], b[key])));

/** @param {string | null} id @returns {[epoch: string, offset: number]} */
const place = (id) => {
	const [, epoch, offset] = /^(.+)-(\d+)$/.exec(id ?? "") ?? [];
	if (!epoch) throw failure("invalid_response", "The server did not name a place in the thread's log");
	return [epoch, Number(offset)];
};

/** @param {number} tries */
const backoff = (tries) => Math.min(15e3, 500 * 2 ** tries) * (0.5 + Math.random() / 2);

/** @param {() => void} back called when a slept tab or network returns @param {AbortController} until */
const onBack = (back, { signal }) => {
	for (const type of ["online", "pageshow", "visibilitychange"])
		globalThis.addEventListener?.(type, () => (type > "v" && document.hidden) || back(), { signal });
};

/** @param {number} ms @param {AbortSignal} [signal] */
const sleep = (ms, signal) =>
	new Promise((resolve) => {
		const off = new AbortController();
		const done = () => resolve(off.abort());
		off.signal.onabort = () => clearTimeout(timer);
		const timer = setTimeout(done, ms);
		onBack(done, off);
		signal?.addEventListener("abort", done, off);
	});

/**
 * One thread and its event stream, for all its users.
 * @param {(query: string, signal: AbortSignal) => Promise<[any, string | null]>} get
 * @param {(id: string) => EventSource} connect @param {() => void} forget
 */
const follow = (get, connect, forget) => {
	/** @typedef {{set?: Setter | null, seen: (shown: Entry[], run: (id: string) => Run | null | undefined) => void, fail: (error: any) => void}} User */
	/** @typedef {{entry: Entry, shown?: Entry, at: number}} Slot `at`: events up to this offset are in it already */
	/** @type {Set<User>} */
	const users = new Set();
	/** @type {Map<Setter, Entry[]>} what each `set` got last */
	const got = new Map();
	/** @type {Slot[]} */
	let list = [];
	/** @type {Map<string, Slot>} by message id and by run id */
	let slots = new Map();
	/** @type {{list: Slot[], slots: typeof slots} | undefined} what a snapshot that is not complete yet replaces */
	let old;
	/** @type {Map<string, [name: string, data: any, offset: number][]>} events that came before their entry */
	let early = new Map();
	/** @type {Entry[] | undefined} */
	let shown;
	/** Objects that no `set` has got: free to change. */
	const owned = new Set();
	const off = new AbortController();
	let complete = false, due = false, opened = false;
	let last = "", epoch = "", offset = 0, since = 0, turn = 0, tries = 0, heard = 0;
	/** @type {any} */
	let source, ended, late;

	const open = () => {
		source?.close();
		const mine = (source = connect(last));
		opened = false;
		heard = Date.now();
		const hear = () => { opened = true; heard = Date.now(); };
		mine.onopen = hear;
		// The browser's own reconnecting ends for good at a 502.
		mine.onerror = () => { if (mine === source) retry(); };
		mine.addEventListener("ping", hear);
		for (const name of EVENTS.split(" "))
			mine.addEventListener(`thread.${name}`, (event) => {
				if (mine !== source) return;
				hear();
				receive(name, JSON.parse(event.data), event.lastEventId);
			});
	};

	const retry = async () => {
		if (!source) return;
		source = source.close();
		try {
			// EventSource hides why it could not open: this waits for the server, or throws what is final.
			if (!opened) await get("limit=1", off.signal);
			await sleep(backoff(tries++), off.signal);
			if (!off.signal.aborted) open();
		} catch (error) {
			end(error);
		}
	};

	/** Asks for a snapshot, as what is here can't be completed. */
	const restart = () => {
		turn++;
		last = "";
		retry();
	};

	/** @param {string} name @param {any} data @param {string} id */
	const receive = (name, data, id) => {
		if (name === "deleted") return end(failure("thread_not_found", "The thread was deleted"));
		const [newEpoch, newOffset] = place(id);
		if (name === "snapshot") {
			if (complete) old = { list, slots };
			list = [];
			slots = new Map();
			early = new Map();
			complete = false;
			epoch = newEpoch;
			since = newOffset;
		} else {
			if (newEpoch !== epoch || newOffset > offset + 1) return restart();
			if (newOffset <= offset) return;
			tries = 0;
		}
		last = id;
		offset = newOffset;
		if (name !== "snapshot") apply(name, data, offset);
		else { prepend(data.data, offset); load(data.has_more); }
		schedule();
	};

	/** @param {boolean} more */
	const load = async (more) => {
		const mine = ++turn;
		try {
			while (more && !meets()) {
				const [page, id] = await get(`limit=200&before=${list[0].entry.message.id}`, off.signal);
				if (mine !== turn) return;
				const [pageEpoch, at] = place(id);
				if (pageEpoch !== epoch || at < since) return restart();
				prepend(page.data, at);
				more = page.has_more && page.data[0];
			}
			old = undefined;
			complete = true;
			tries = 0;
			schedule();
		} catch (/** @type {any} */ error) {
			if (mine !== turn) return;
			if (error.code === "message_not_found") restart();
			else end(error);
		}
	};

	/** Joins what came with what is known, if nothing older can have changed. */
	const meets = () => {
		const slot = list[0] && old?.slots.get(list[0].entry.message.id);
		const older = slot && old?.list.slice(0, old.list.indexOf(slot)).map(({ entry }) => entry);
		if (!older?.every(({ message, run }) => over(message) && (!run || over(run)))) return !list[0];
		prepend(older, 0);
		return true;
	};

	/** @param {Entry[]} entries @param {number} at */
	const prepend = (entries, at) => {
		const fresh = entries.filter(({ message }) => !slots.has(message.id));
		list = [...fresh.map((entry) => add(entry, at)), ...list];
	};

	/** @param {Entry} entry @param {number} at @returns {Slot} */
	const add = (entry, at) => {
		const { id, run_id } = entry.message;
		const slot = { entry, at, shown: old?.slots.get(id)?.shown };
		for (const key of [id, run_id ?? id]) {
			slots.set(key, slot);
			const events = early.get(key);
			early.delete(key);
			events?.forEach((event) => apply(...event));
		}
		return slot;
	};

	/** @param {string} name @param {any} data @param {number} at */
	const apply = (name, data, at) => {
		const [kind, step, what] = name.split(".");
		const key = what ? data.run_id : data.id;
		if (name === "message.created" && !slots.has(key))
			list.push(add({ assistant_id: data.assistant_id, message: data, run: null, steps: [] }, 0));
		const slot = slots.get(key);
		if (!slot) {
			// Its page is on the way, or it is a run whose message comes next.
			if (!complete || kind === "run") early.set(key, [...(early.get(key) ?? []), [name, data, at]]);
			return;
		}
		if (at <= slot.at) return;
		const entry = own(slot, "entry");
		if (what) {
			const steps = own(entry, "steps", []);
			const i = steps.findIndex((/** @type {any} */ { id }) => id === data.id);
			if (what !== "delta") steps[i < 0 ? steps.length : i] = data;
			else if (i >= 0) merge(own(steps, i), data.delta);
		} else if (step === "delta") merge(own(entry, kind), data.delta);
		else entry[kind] = data;
	};

	/** @param {any} holder @param {string | number} key @param {object} [fallback] */
	const own = (holder, key, fallback) => {
		const value = holder[key] ?? fallback;
		if (owned.has(value)) return value;
		owned.add((holder[key] = Array.isArray(value) ? [...value] : { ...value }));
		return holder[key];
	};

	/** @param {any} target @param {object} delta */
	const merge = (target, delta) => {
		for (const [key, value] of Object.entries(delta)) {
			if (Array.isArray(value)) {
				const items = own(target, key, []);
				if (key === "annotations") items.push(...value);
				else for (const { index, ...part } of value) merge(own(items, index, {}), part);
			} else if (value && typeof value === "object") {
				merge(own(target, key, key === "text" ? { value: "", annotations: [] } : {}), value);
			} else target[key] = /^(value|refusal|text)$/.test(key) ? (target[key] ?? "") + value : value;
		}
	};

	const schedule = () => {
		if (due) return;
		due = true;
		if (globalThis.document?.visibilityState === "visible" && globalThis.requestAnimationFrame) {
			requestAnimationFrame(flush);
			// No frame comes if the tab is hidden before it.
			late = setTimeout(flush, 200);
		} else queueMicrotask(flush);
	};

	const flush = () => {
		if (!due) return;
		due = false;
		clearTimeout(late);
		if (!complete && !ended) return;
		if (complete) {
			let changed = list.length !== shown?.length;
			const now = list.map((slot, i) => {
				slot.entry = slot.shown = slot.shown && equal(slot.entry, slot.shown) ? slot.shown : slot.entry;
				changed ||= slot.entry !== shown?.[i];
				return slot.entry;
			});
			owned.clear();
			if (changed) shown = now;
		}
		const array = shown ?? [];
		if (complete)
		for (const { set } of users) {
			if (!set || got.get(set) === array) continue;
			// A copy for who is new: the same `set` may have got this array before it left.
			const first = !got.has(set);
			got.set(set, array);
			try {
				set(first ? [...array] : array);
			} catch (error) {
				(globalThis.reportError ?? console.error)(error);
			}
		}
		for (const user of users)
			if (ended) user.fail(ended);
			else user.seen(array, (id) => slots.get(id)?.entry.run);
	};

	/** @param {any} error */
	const end = (error) => {
		if (off.signal.aborted) return;
		close();
		ended = error;
		if (shown && error.code === "thread_not_found") {
			list = [];
			complete = true;
		}
		schedule();
	};

	const close = () => {
		forget();
		off.abort();
		clearInterval(watch);
		source = source?.close();
	};

	open();
	const watch = setInterval(() => { if (Date.now() - heard > 40e3) retry(); }, 5e3);
	onBack(() => { if (source && Date.now() - heard > (opened ? 20e3 : 2e3)) open(); }, off);

	/** @param {User} user @returns {() => void} leaves */
	return (user) => {
		users.add(user);
		schedule();
		return () => {
			users.delete(user);
			if (user.set && ![...users].some(({ set }) => set === user.set)) got.delete(user.set);
			// Later, as a page may come back at once (React's StrictMode).
			setTimeout(() => users.size || close());
		};
	};
};

/**
 * The same functions for a page that has a copy of this file; `baseUrl` is where the blueprint is.
 * @param {{baseUrl?: string, fetch?: typeof globalThis.fetch, EventSource?: typeof globalThis.EventSource}} [options]
 */
export const createAssistream = (options = {}) => {
	/** @type {Map<string, ReturnType<typeof follow>>} */
	const threads = new Map();

	/** @param {string} path */
	const url = (path) => {
		const { baseUrl } = options;
		const base = new URL(baseUrl ?? ".", baseUrl == null ? import.meta.url : globalThis.document?.baseURI);
		return new URL(base.pathname.replace(/\/*$/, "/") + path, base).href;
	};

	/**
	 * A GET is tried until the server can answer; a POST (with a body) too, under one key, but not for ever.
	 * @param {string} path @param {object} [body] @param {AbortSignal} [signal]
	 * @returns {Promise<[answer: any, place: string | null]>}
	 */
	const call = async (path, body, signal) => {
		const href = url(path);
		const post = body && {
			method: "POST",
			body: JSON.stringify(body),
			headers: {
				"Content-Type": "application/json",
				// Not randomUUID, which is for secure contexts only.
				"Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-"),
			},
		};
		for (let tries = 0; ; tries++) {
			if (signal?.aborted) throw abortError(signal);
			const stop = new AbortController();
			const halt = () => stop.abort();
			const timer = setTimeout(halt, 30e3);
			signal?.addEventListener("abort", halt, stop);
			let error, final, after = 0;
			try {
				const response = await (options.fetch ?? fetch)(
					href, { credentials: "same-origin", ...post, signal: stop.signal });
				const { ok, status, headers } = response;
				const answer = await response.json().catch((reason) => { if (ok) throw reason; });
				if (ok) return [answer, headers.get("Last-Event-ID")];
				const { code = `http_${status}`, message = `The server answered ${status}` } = answer?.error ?? {};
				error = failure(code, message, { status });
				after = parseFloat(headers.get("Retry-After") ?? "");
				if (status === 429) final = post && (!(after <= 5) || tries > 3);
				else final = status !== 408 && (post ? status < 502 || status > 504 : status < 500);
			} catch (/** @type {any} */ reason) {
				error = failure("network_error", `The server could not be reached: ${reason.message}`);
				// What was written offline waits for the network.
				if (globalThis.navigator?.onLine === false) tries = Math.min(tries, 5);
			}
			clearTimeout(timer);
			halt();
			if (final || (post && tries > 20)) throw error;
			await sleep(Math.max(backoff(tries), after * 1e3 || 0), signal);
		}
	};

	/** @param {string} id */
	const at = (id) => {
		need(id && typeof id === "string", "thread_id must be a non-empty string", id);
		return `threads/${encodeURIComponent(id)}/`;
	};

	/** @param {string} id @param {User} user */
	const join = (id, user) => {
		const path = at(id);
		if (!threads.has(id)) {
			const thread = follow(
				(query, signal) => call(`${path}messages?${query}`, undefined, signal),
				(last) => new (options.EventSource ?? EventSource)(
					url(`${path}events${last && `?last_event_id=${encodeURIComponent(last)}`}`)),
				() => { if (threads.get(id) === thread) threads.delete(id); });
			threads.set(id, thread);
		}
		return /** @type {ReturnType<typeof follow>} */ (threads.get(id))(user);
	};

	/**
	 * @param {string} thread_id @param {string[]} assistant_ids @param {Setter | null | undefined} set
	 * @param {Options & {content?: string, mode?: string}} options @returns {Promise<Run[]>}
	 */
	const start = (thread_id, assistant_ids, set, { signal, ...body }) =>
		new Promise((resolve, reject) => {
			const path = `${at(thread_id)}runs`;
			need(set == null || typeof set === "function", "set must be a function or null", set);
			for (const id of assistant_ids)
				need(id && typeof id === "string", "an assistant id must be a non-empty string", id);
			if (signal?.aborted) throw abortError(signal);
			/** @type {Run[] | undefined} */
			let runs;
			let leave = () => {};
			const cancel = () => {
				reject(abortError(signal, runs));
				for (const run of runs ?? [])
					if (!over(run)) call(`${path}/${run.id}/cancel`, {}).catch(() => {});
			};
			/** @param {any} [error] */
			const settle = (error) => {
				leave();
				signal?.removeEventListener("abort", cancel);
				if (error) reject(Object.assign(failure(error.code, error.message, error), runs && { runs }));
				else resolve(runs ?? []);
			};
			signal?.addEventListener("abort", cancel);
			call(path, { assistant_ids, ...body }).then(([answer]) => {
				/** @type {Run[]} */
				let now = (runs = answer.runs);
				leave = join(thread_id, {
					set,
					fail: settle,
					seen: (_, find) => {
						const gone = now.some(({ id }, i) => now[i] !== answer.runs[i] && find(id) === undefined);
						if (gone) return settle(failure("run_not_found", "The run was deleted"));
						runs = now = now.map((run) => find(run.id) ?? run);
						if (!now.every(over)) return;
						const failed = now.find(({ status }) => status === "failed");
						const { code, message } = failed?.last_error ?? { code: "server_error", message: "The run failed" };
						settle(failed && failure(code, message));
					},
				});
				// Aborted while the POST was under way: only now is it known what to cancel.
				if (signal?.aborted) cancel();
			}).catch(settle);
		});

	return {
		/**
		 * Keeps `set` up to date until `signal` aborts; resolves after its first call.
		 * @param {string} thread_id @param {Setter} set @param {Options} [options] @returns {Promise<Entry[]>}
		 */
		loadThread: async (thread_id, set, { signal } = {}) => {
			need(typeof set === "function", "set must be a function", set);
			if (signal?.aborted) throw abortError(signal);
			return new Promise((resolve, reject) => {
				const leave = join(thread_id, { set, seen: resolve, fail: reject });
				signal?.addEventListener("abort", () => reject(abortError(signal, leave())));
			});
		},

		/**
		 * @param {string} thread_id @param {string} content @param {Options} [options]
		 * @returns {Promise<Entry>}
		 */
		addMessage: async (thread_id, content, { signal } = {}) =>
			(await call(`${at(thread_id)}messages`, { content }, signal))[0],

		/**
		 * Resolves with the run once it is over; `signal` cancels it.
		 * @param {string} thread_id @param {string} assistant_id @param {Setter | null} [set]
		 * @param {Options} [options] @returns {Promise<Run>}
		 */
		run: async (thread_id, assistant_id, set, { signal } = {}) =>
			(await start(thread_id, [assistant_id], set, { signal }))[0],

		/**
		 * @param {string} thread_id @param {string} message @param {string} assistant_id
		 * @param {Setter | null} [set] @param {Options} [options] @returns {Promise<Run>}
		 */
		addMessageAndRun: async (thread_id, message, assistant_id, set, { signal } = {}) =>
			(await start(thread_id, [assistant_id], set, { signal, content: message }))[0],

		/**
		 * @param {string} thread_id @param {string} message @param {string[]} assistant_ids
		 * @param {Setter | null} [set] @param {Options & {mode?: "parallel" | "sequential"}} [options]
		 * @returns {Promise<Run[]>}
		 */
		addMessageAndRuns: async (thread_id, message, assistant_ids, set, { signal, mode } = {}) =>
			start(thread_id, assistant_ids, set, { signal, content: message, mode }),

		/** @param {object} [metadata] @param {Options} [options] @returns {Promise<string>} its id */
		createThread: async (metadata, { signal } = {}) => (await call("threads", { metadata }, signal))[0].id,
	};
};

/** @param {Entry} entry @returns {string} all it says */
export const text = (entry) =>
	entry.message.content.map((/** @type {any} */ part) => part.text?.value ?? part.refusal ?? "").join("");

export const { loadThread, addMessage, run, addMessageAndRun, addMessageAndRuns, createThread } =
	createAssistream();
