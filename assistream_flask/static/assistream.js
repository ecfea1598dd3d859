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

/**
 * How a thread reaches the page. `live`: as it grows. `connecting`: not at the moment, it is tried again.
 * `unauthenticated`: the session is over; it goes on once the user has signed in again. `polling`: a proxy holds the
 * stream back, so the page asks every few seconds. `paused`: the tab is hidden and other tabs need the connections.
 *
 * @typedef {"live" | "connecting" | "unauthenticated" | "polling" | "paused"} State
 * @typedef {Options & {onstate?: (state: State) => void}} StreamOptions
 */

// ---------------------------------------------------------------- small things

const EVENTS =
	"snapshot deleted message.created message.delta message.completed message.incomplete run.created " +
	"run.queued run.in_progress run.requires_action run.completed run.incomplete run.failed run.cancelled " +
	"run.step.created run.step.delta run.step.completed";

/** Streams that all tabs of an origin may have over HTTP/1.1. A browser opens six connections; two are for requests. */
const MOST_STREAMS = 4;

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

const hiddenTab = () => !!globalThis.document?.hidden;

/** @type {Set<string>} */
const said = new Set();

/** Warns once a page: the cause stays, and a console full of it helps nobody. */
const warn = (/** @type {string} */ text) => {
	if (said.has(text)) return;
	said.add(text);
	console.warn(`assistream: ${text}`);
};

/** @type {(call: Function | undefined, value: any) => void} A bug of the page's must not stop the stream. */
const tell = (call, value) => {
	try {
		call?.(value);
	} catch (error) {
		reportError(error);
	}
};

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
 * Milliseconds before the next try, in an outage that is `old` by now. A deploy is over in seconds: waits that double
 * would keep the page away for as long again as the server was. The jitter keeps a crowd from coming all at once.
 */
const backoff = (tries = 0, old = 0) =>
	Math.min(old < 30e3 ? 3e3 : 15e3, 500 * 2 ** tries) * (0.5 + Math.random() / 2);

/** @type {(back: () => void, signal: AbortSignal) => void} */
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

// ---------------------------------------------------------------- events in, entries out

/** @typedef {{entry: Entry, at: number, i: number}} Slot an entry, exact as of `at`, and its index */

/** One thread, folded from snapshots, pages and events. Knows no network and no clock. */
const fold = () => {
	/** @type {Slot[]} */
	let list = [];
	/** @type {Map<string, Slot>} by message id and by run id */
	let slots = new Map();
	/** @type {any[]} events before their entry */
	let early = [];
	/** What changed since it was last shown; null while pages are missing. @type {Set<Slot> | null} */
	let changed = null;
	/** @type {Entry[]} */
	let shown = [];
	/** Shown last, by message id. @type {Map<string, Entry>} */
	const known = new Map();
	/** Objects that nobody was shown yet, so free to change: a long text costs no copy for each word. */
	const owned = new Set();

	/** Starts from the newest page. @type {(entries: Entry[], at: number) => void} */
	const reset = (entries, at) => {
		list = [];
		slots = new Map();
		early = [];
		changed = null;
		prepend(entries, at);
	};

	/** Puts an older page before the rest. @type {(entries: Entry[], at: number) => void} */
	const prepend = (entries, at) => {
		list = [...entries.map((entry) => add(entry, at)), ...list];
		replay();
	};

	/** @type {(entry: Entry, at: number) => Slot} */
	const add = (entry, at) => {
		const { id, run_id } = entry.message, was = known.get(id);
		const slot = { entry: was && equal(entry, was) ? was : entry, at, i: list.length };
		slots.set(id, slot).set(run_id ?? id, slot);
		return slot;
	};

	const replay = () => { for (const [name, data, at] of early.splice(0)) apply(name, data, at); };

	/** Whether the pages so far reach what is known and final: older pages need not come again then. */
	const meets = () => {
		const first = known.get(list[0].entry.message.id);
		const i = first ? shown.indexOf(first) : -1;
		const older = shown.slice(0, i);
		if (i < 0 || !older.every(({ message, run }) => [message, run ?? message].every(over))) return false;
		prepend(older, 0);
		return true;
	};

	/** All pages are here. Nothing is shown before it. */
	const complete = () => {
		list.forEach((slot, i) => { slot.i = i; });
		changed = new Set(list);
	};

	/** @type {(name: string, data: any, at: number) => void} */
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
		if (step) applyStep(own(entry, "steps"), step, data);
		else if (what === "delta") merge(own(entry, kind), data.delta);
		else entry[kind] = data;
	};

	/** @type {(steps: any[], what: string, data: any) => void} */
	const applyStep = (steps, what, data) => {
		let i = steps.findIndex(({ id }) => id === data.id);
		if (i < 0) i = steps.length;
		if (what === "delta") merge(own(steps, i), data.delta);
		else steps[i] = data;
	};

	/** Gives `holder[key]`, as a copy where it was shown: what `set` got must never change. */
	const own = (/** @type {any} */ holder, /** @type {string | number} */ key) => {
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

	/** Gives what to show, the same array where nothing changed; null while pages are missing. */
	const show = () => {
		if (!changed) return null;
		const now = shown.slice(0, list.length);
		let same = list.length === shown.length;
		for (const slot of changed) {
			const { entry, i } = slot, { id } = entry.message, was = known.get(id);
			now[i] = slot.entry = was && equal(entry, was) ? was : entry;
			known.set(id, now[i]);
			same &&= now[i] === shown[i];
		}
		owned.clear();
		changed.clear();
		if (!same) shown = now;
		return shown;
	};

	return {
		reset, prepend, meets, complete, apply, show,
		oldest: () => list[0].entry.message.id,
		/** @type {(run_id: string) => Run | null | undefined} undefined: its entry is not there */
		run: (run_id) => slots.get(run_id)?.entry.run,
		has: (/** @type {string} */ id) => slots.has(id),
		running: () => shown.some(({ run }) => run && !over(run)),
	};
};

// ---------------------------------------------------------------- who looks at a thread

/**
 * @typedef {{set?: any, seen: (shown: Entry[]) => void, fail: (error: any) => void, onstate?: (state: State) => void,
 *   waits?: boolean, state?: State}} User `waits`: for a run's end, so a tab that let go of its stream asks for it
 */

/**
 * All users of one thread's stream, and when they are told.
 * @type {(entries: ReturnType<typeof fold>, clock: () => number) => any}
 */
const gather = (entries, clock) => {
	/** @type {Set<User>} */
	const users = new Set();
	/** @type {Map<Setter, Entry[]>} what each `set` got last */
	const got = new Map();
	/** @type {State} */
	let state = "connecting";
	let told = 0;
	let [due, ended] = /** @type {any[]} */ ([]);

	/**
	 * Has `flush` called soon: at the next frame, and in a hidden tab, which has no frames, once for many deltas.
	 * Timers of hidden tabs wait a second, after five minutes a minute: what is `urgent`, such as a run's end, never
	 * waits for one, nor does text when the last flush is long ago.
	 */
	const schedule = (urgent = true) => {
		const left = Math.min(told + 75 - clock(), 75);
		if (globalThis.document?.visibilityState === "visible") {
			if (due) return;
			// In a tab that is hidden before the frame, none comes.
			due = setTimeout(flush, 200);
			requestAnimationFrame(flush);
		} else {
			due ??= setTimeout(flush, left);
			if (urgent || left <= 0) queueMicrotask(flush);
		}
	};

	const flush = () => {
		if (!due) return;
		due = clearTimeout(due);
		told = clock();
		const shown = entries.show();
		if (shown) for (const { set } of users) give(set, shown);
		for (const user of users)
			if (ended) user.fail(ended);
			else if (shown) user.seen(shown);
	};

	/** @type {(set: any, shown: Entry[]) => void} */
	const give = (set, shown) => {
		if (!set || got.get(set) === shown) return;
		// A copy, as `set` may have got this array before it left.
		const array = got.has(set) ? shown : [...shown];
		got.set(set, shown);
		tell(set, array);
	};

	const inform = (/** @type {User} */ user) => {
		if (!users.has(user) || user.state === state) return;
		user.state = state;
		tell(user.onstate, state);
	};

	return {
		schedule,
		/** What waits for a timer of the hidden tab gets a frame, now that it is looked at. */
		back: () => {
			if (!due) return;
			due = clearTimeout(due);
			schedule();
		},
		count: () => users.size,
		shows: () => got.size > 0,
		waits: () => [...users].some(({ waits }) => waits),
		add: (/** @type {User} */ user) => {
			users.add(user);
			// Not before the call that joins has returned.
			queueMicrotask(() => inform(user));
			schedule();
		},
		remove: (/** @type {User} */ user) => {
			users.delete(user);
			if (user.set && ![...users].some(({ set }) => set === user.set)) got.delete(user.set);
		},
		state: (/** @type {State} */ now) => {
			if (now === state) return;
			state = now;
			users.forEach(inform);
		},
		end: (/** @type {any} */ error) => {
			ended = error;
			schedule();
		},
	};
};

// ---------------------------------------------------------------- how many streams all tabs have

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
 * @type {(origin: () => string) => {enter: (hold: (on: boolean) => void) => void, leave: (hold: any) => void}}
 */
const countTabs = (origin) => {
	/** @type {Set<(on: boolean) => void>} */
	const streams = new Set();
	/** @type {Map<string, {id: string, streams: number, hidden: number, missed: number}>} */
	const others = new Map();
	// `hidden` is compared with that of other tabs: the one clock that they share is Date.now().
	let id = "", hidden = 0, away = false;
	let [channel, timer, off] = /** @type {any[]} */ ([]);

	const post = (more = {}) => channel?.postMessage({ id, streams: streams.size, hidden, ...more });

	/** Whether this tab's streams are among the first four: visible tabs first, then the last hidden. */
	const fits = () => {
		let left = MOST_STREAMS - streams.size;
		for (const other of others.values()) {
			const before = !other.hidden || other.hidden > hidden || (other.hidden === hidden && other.id < id);
			if (before) left -= other.streams;
		}
		return !hidden || left >= 0;
	};

	const decide = () => {
		const holds = away || !(fits() || multiplexed(origin()));
		if (holds && !away)
			warn("This tab lets go of its event stream until it is looked at: a browser opens only six connections to a " +
				"server over HTTP/1.1, over all tabs, and with each taken by a stream the whole app would hang. Serve " +
				"HTTP/2 at the proxy, and every tab keeps its own.");
		for (const hold of streams) hold(holds);
	};

	const hear = (/** @type {any} */ { data }) => {
		if (data.streams) others.set(data.id, { ...data, missed: 0 });
		else others.delete(data.id);
		if (data.ask) post();
		decide();
	};

	/**
	 * Forgets tabs that vanished without a word. Those that are there answer, however much their timers are
	 * throttled; by the time alone, all would be forgotten when a laptop wakes.
	 */
	const ask = () => {
		for (const other of [...others.values()]) if (++other.missed > 2) others.delete(other.id);
		post({ ask: true });
		decide();
	};

	const look = () => {
		hidden = hiddenTab() ? hidden || Date.now() : 0;
		post();
		decide();
	};

	const openChannel = () => {
		try {
			channel = new BroadcastChannel(`assistream ${origin()}`);
			channel.onmessage = hear;
		} catch { /* There is none, or storage is forbidden: this tab counts its own only. */ }
		post({ ask: true });
	};

	const closeChannel = () => {
		post({ streams: 0 });
		channel = channel?.close();
		others.clear();
	};

	const start = () => {
		id ||= crypto.getRandomValues(new Uint32Array(2)).join("-");
		hidden = hiddenTab() ? Date.now() : 0;
		off = new AbortController();
		timer = setInterval(ask, 30e3);
		const on = (/** @type {string} */ type, /** @type {() => void} */ then) =>
			globalThis.addEventListener?.(type, then, off);
		on("visibilitychange", look);
		// A page with an open channel or stream can't be kept for the back button.
		on("pagehide", () => {
			// Node may call it after `off`, once its listener on the signal was collected as garbage.
			away = streams.size > 0;
			closeChannel();
			decide();
		});
		on("pageshow", () => {
			if (!away) return;
			away = false;
			openChannel();
			look();
		});
		openChannel();
	};

	const stop = () => {
		closeChannel();
		clearInterval(timer);
		off.abort();
		away = false;
	};

	return {
		enter: (hold) => {
			if (!globalThis.document) return;
			streams.add(hold);
			if (streams.size === 1) start();
			else post();
			decide();
		},
		leave: (hold) => {
			if (!streams.delete(hold)) return;
			if (!streams.size) return stop();
			post();
			decide();
		},
	};
};

// ---------------------------------------------------------------- the connection and the commands

/**
 * For a copy of this file: `baseUrl` is where the blueprint is.
 * @param {{baseUrl?: string, fetch?: typeof fetch, EventSource?: typeof EventSource}} [options]
 */
export const createAssistream = (options = {}) => {
	/** @typedef {{entries: ReturnType<typeof fold>, join: (user: User) => () => void}} Followed `join` gives what leaves */
	/** @type {Map<string, Followed>} */
	const threads = new Map();
	/** Ends the waits of streams and polls: a POST that succeeds proves that the server is there and knows the user. */
	const wakers = /** @type {Set<() => void>} */ (new Set());
	const clock = makeClock();
	const tabs = countTabs(() => new URL(url()).origin);

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

	const command = (/** @type {object} */ body) => ({
		method: "POST",
		body: JSON.stringify(body),
		headers: {
			"Content-Type": "application/json",
			// randomUUID needs a secure context.
			"Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-"),
		},
	});

	/**
	 * Tries once, for a minute at most: where a connection hangs, nobody else tells. `final`: trying again does not help.
	 * Rejects only where `signal` ended it.
	 * @type {(href: string, post: any, signal?: AbortSignal) => Promise<{answer?: any[], error?: any, final?: any, after?: any}>}
	 */
	const request = async (href, post, signal) => {
		// Not AbortSignal.any(), which browsers before 2024 lack.
		const until = new AbortController();
		const stop = () => until.abort();
		const timer = setTimeout(stop, 60e3);
		signal?.addEventListener("abort", stop, until);
		try {
			const response = await (options.fetch ?? fetch)(
				href, { credentials: "same-origin", ...post, signal: until.signal });
			const { ok, status, headers } = response;
			const answer = await response.json().catch((error) => { if (ok) throw error; });
			if (ok) return { answer: [answer, headers.get("Last-Event-ID")] };
			const error = failure(`http_${status}`, `The server answered ${status}`, { status, ...answer?.error });
			// The app itself may ask who it is before the blueprint does, in words of its own.
			if (status === 401 && !answer?.error?.code) error.code = "unauthenticated";
			// Without our error it is some proxy's word.
			const final = ![408, 429, 502, 503, 504].includes(status) &&
				(post || status === 401 || (status < 500 && answer?.error));
			return { error, final, after: parseFloat(headers.get("Retry-After") ?? "") };
		} catch (reason) {
			if (signal?.aborted) throw abortError();
			return { error: failure("network_error", `No answer: ${reason}`) };
		} finally {
			clearTimeout(timer);
			// Lets go of `signal`.
			stop();
		}
	};

	/**
	 * Tries until there is an answer: a GET for ever, a POST (which has a body) for minutes, under one key.
	 * @type {(path: string, body?: object, signal?: AbortSignal) => Promise<any[]>} answer, place
	 */
	const call = async (path, body, signal) => {
		const post = body && command(body), href = url(path);
		for (let tries = 0, since = 0; ; tries++) {
			if (signal?.aborted) throw abortError();
			const { answer, error, final, after } = await request(href, post, signal);
			if (answer) {
				if (post) for (const wake of [...wakers]) wake();
				return answer;
			}
			// One that is told to wait for seconds does; what would be minutes is the user's to decide.
			const busy = post && error.status === 429;
			if (final || (busy && (!(after <= 5) || tries > 3)) || (post && tries > 24)) throw error;
			since ||= clock();
			if (error.code === "network_error" && globalThis.navigator?.onLine === false) {
				// What is sent offline waits, for as long as it takes.
				tries = Math.min(tries, 5);
				since = clock();
			}
			await sleep(Math.max(backoff(tries, clock() - since), after * 1e3 || 0), signal, post ? undefined : wakers);
		}
	};

	/** One thread's stream, for all its users. @type {(thread_id: string) => Followed} */
	const follow = (thread_id) => {
		const path = at(thread_id);
		const off = new AbortController();
		const entries = fold();
		const users = gather(entries, clock);
		/** Until when the present way to the thread (a stream, a retry, the polls) counts. */
		let attempt = new AbortController();
		/** The place in the log: what was received last, and where the snapshot was. */
		let last = "", epoch = "", offset = 0, since = 0;
		/** Counts loads, so that an older one stops. */
		let turn = 0;
		/** Of the outage: how many tries it took so far, and since when. */
		let tries = 0, lost = 0;
		/** Of the present stream: was it opened, did it say anything, and when (or when it was asked for). */
		let opened = false, told = false, heard = 0;
		/** Lets go for the other tabs; asks, as the stream is held back; found so before; is being found out. */
		let paused = false, polling = false, suspected = false, doubting = false;
		/** All pages were there once: from then on a lost session is waited out. */
		let loaded = false;
		let ticked = clock();
		/** @type {EventSource | undefined} */
		let source;

		/** Ends the present way, and gives the signal of the next one. */
		const next = () => {
			attempt.abort();
			source = void source?.close();
			return (attempt = new AbortController()).signal;
		};

		const open = () => {
			next();
			users.state("connecting");
			listen();
		};

		const listen = () => {
			source?.close();
			opened = told = false;
			heard = clock();
			source = new (options.EventSource ?? EventSource)(
				url(`${path}events${last && `?last_event_id=${last}`}`));
			source.onopen = () => {
				opened = true;
				// A stream that goes on from a place may have nothing to say for a while.
				if (last && !polling) users.state("live");
			};
			// The browser itself gives up at a 502.
			source.onerror = () => { polling ? (source = void source?.close()) : retry(); };
			source.addEventListener("ping", () => {
				tries = lost = 0;
				hear();
			});
			for (const name of EVENTS.split(" "))
				source.addEventListener(`thread.${name}`, (/** @type {MessageEvent} */ event) => {
					hear();
					receive(name, JSON.parse(event.data), event.lastEventId);
				});
		};

		/** The stream's bytes arrive: nothing else is needed. */
		const hear = () => {
			heard = clock();
			told = true;
			if (polling) {
				polling = false;
				// Ends the polls, not the stream.
				attempt.abort();
				attempt = new AbortController();
			}
			users.state("live");
		};

		const retry = async () => {
			if (!source) return;
			const signal = next();
			lost ||= clock();
			users.state("connecting");
			try {
				// EventSource hides why it failed: this waits for the server or throws.
				if (!opened) await ask(1, signal);
				users.state("connecting");
				await sleep(backoff(tries++, clock() - lost), signal, wakers);
				if (!signal.aborted) open();
			} catch (error) {
				if (!signal.aborted) end(error);
			}
		};

		/** Asks for a snapshot. */
		const restart = () => {
			last = "";
			retry();
		};

		/**
		 * The newest messages, once there is an answer. A session that ended is waited out where the thread was shown
		 * before: who signs in again, in whatever tab, goes on where they were.
		 * @type {(limit: number, signal: AbortSignal) => Promise<any[]>}
		 */
		const ask = async (limit, signal) => {
			for (let refused = 0, from = clock(); ; refused++) {
				try {
					const found = await call(`${path}messages?limit=${limit}`, undefined, signal);
					if (signal.aborted) throw abortError();
					return found;
				} catch (/** @type {any} */ error) {
					if (signal.aborted || !loaded || error.code !== "unauthenticated") throw error;
				}
				warn("The server does not know the user any more (401): the session is over. The thread goes on once they " +
					"have signed in again.");
				users.state("unauthenticated");
				await sleep(backoff(refused, clock() - from), signal, wakers);
			}
		};

		/** @type {(name: string, data: any, id: any) => any} */
		const receive = (name, data, id) => {
			if (name === "deleted") return end(failure("thread_not_found", "The thread was deleted"));
			const [from, at] = place(id);
			if (name === "snapshot") {
				// A proxy may have held this one back while the polls went on.
				if (last && from === epoch && at < offset) return;
				entries.reset(data.data, at);
				[last, epoch, offset, since] = [id, from, at, at];
				return load(data.has_more);
			}
			if (from !== epoch || at > offset + 1) return restart();
			if (at <= offset) return;
			tries = lost = 0;
			entries.apply(name, data, at);
			[last, offset] = [id, at];
			users.schedule(/^run\.[^s]/.test(name));
		};

		/** Gets the older pages. */
		const load = async (more = false) => {
			const mine = ++turn;
			try {
				while (more && !entries.meets()) {
					const [page, id] = await call(
						`${path}messages?limit=200&before=${entries.oldest()}`, undefined, off.signal);
					if (mine !== turn) return;
					const [from, at] = place(id);
					if (from !== epoch || at < since) return restart();
					entries.prepend(page.data, at);
					more = page.has_more && page.data[0];
				}
				tries = lost = 0;
				loaded = true;
				entries.complete();
				users.schedule();
			} catch (/** @type {any} */ error) {
				if (mine !== turn) return;
				// The way back waits where that helps.
				if (error.code === "message_not_found" || (loaded && error.code === "unauthenticated")) restart();
				else end(error);
			}
		};

		/** Opens a stream anew that has been silent for too long: nobody tells of a connection that died. */
		const check = (/** @type {number} */ silence) => {
			if (source && !polling && clock() - heard > silence) open();
		};

		const watch = () => {
			const slept = clock() - ticked > 15e3;
			const silent = clock() - heard;
			// A snapshot comes at once; otherwise there may be silence until the ping, which comes every 15 s.
			const late = silent > (last ? 20e3 : 10e3);
			ticked = clock();
			if (!source) return;
			// It was one more try; the polls go on.
			if (polling) late && (source = void source.close());
			// Nothing is known of a stream that a laptop slept through.
			else if (silent > 40e3 || (slept && !told)) open();
			else if (late) doubt();
		};

		/**
		 * Finds out whether a proxy holds the stream back: a plain request knows what the stream has not told. Over a slow
		 * network the stream, which was asked for long before, speaks first.
		 */
		const doubt = async () => {
			if (doubting) return;
			doubting = true;
			const { signal } = attempt, before = heard, newest = `${path}messages?limit=50`;
			try {
				const { answer } = await request(url(newest), undefined);
				// The server is away or fails, so the stream was never heard: another one, once it answers.
				if (!answer) await call(newest, undefined, signal);
				// What is on the way arrives.
				else await sleep(2e3, signal);
				if (heard !== before || signal.aborted) return;
				if (!answer) open();
				// Open and with nothing to tell, it may just be quiet.
				else if (answer[1] !== last || !opened) distrust(answer);
			} catch { /* What is wrong shows at the stream itself. */
			} finally {
				doubting = false;
			}
		};

		/**
		 * One that spoke may have died without a word, or its last words wait in the proxy for more to come: what they
		 * are is known now, and another stream tells which it is. One that never spoke is held back.
		 * @type {(answer: any[]) => void}
		 */
		const distrust = ([page, id]) => {
			if (!told || suspected) return suspect();
			receive("snapshot", page, id);
			open();
		};

		const suspect = () => {
			suspected = polling = true;
			warn("Nothing arrives on the event stream although plain requests are answered: a proxy buffers it. Turn that off " +
				"(nginx: proxy_buffering off, or let X-Accel-Buffering pass; see docs/deploy.md). Until then the thread is " +
				"asked for every few seconds.");
			poll();
		};

		const running = () => users.waits() || entries.running();

		/** Milliseconds until the next poll. */
		const pace = () => {
			if (running()) return hiddenTab() ? 5e3 : 2e3;
			return hiddenTab() ? 60e3 : 10e3;
		};

		/** Asks instead of listening. A tab that let go asks only while it has something to wait for. */
		const poll = async (wait = 0) => {
			const signal = next();
			let tried = clock();
			const mode = paused ? "paused" : "polling";
			users.state(mode);
			for (; ; wait = pace()) {
				await sleep(wait, signal, wakers);
				if (signal.aborted) return;
				if (paused && loaded && !running()) continue;
				if (!paused && !source && clock() - tried > 60e3) {
					tried = clock();
					listen();
				}
				try {
					const [page, id] = await ask(50, signal);
					users.state(mode);
					const [from, at] = place(id);
					if (!last || from !== epoch || at > offset) await receive("snapshot", page, id);
				} catch (error) {
					if (!signal.aborted) end(error);
					return;
				}
			}
		};

		/** Lets go of the stream, or takes it up where it was. */
		const hold = (/** @type {boolean} */ on) => {
			if (on === paused) return;
			paused = on;
			if (on) poll(loaded ? pace() : 0);
			else if (polling) poll();
			else open();
		};

		const end = (/** @type {any} */ error) => {
			if (off.signal.aborted) return;
			close();
			if (users.shows() && error.code === "thread_not_found") {
				entries.reset([], 0);
				entries.complete();
			}
			users.end(error);
		};

		const close = () => {
			turn++;
			if (threads.get(thread_id) === followed) threads.delete(thread_id);
			off.abort();
			clearInterval(timer);
			tabs.leave(hold);
			next();
		};

		const join = (/** @type {User} */ user) => {
			users.add(user);
			return () => {
				users.remove(user);
				// Later: React's StrictMode comes back at once.
				setTimeout(() => users.count() || close());
			};
		};

		const followed = { entries, join };
		const timer = setInterval(watch, 5e3);
		onBack(() => {
			users.back();
			check(opened ? 20e3 : 2e3);
		}, off.signal);
		tabs.enter(hold);
		if (!paused) open();
		threads.set(thread_id, followed);
		return followed;
	};

	const followed = (id = "") => threads.get(id) ?? follow(id);

	/** @type {(thread_id: string, assistant_ids: string[], set: any, options?: any) => Promise<Run[]>} */
	const start = (thread_id, assistant_ids, set, { signal, onstate, ...body } = {}) =>
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
				const { entries, join } = followed(thread_id);
				const seen = () => {
					if (runs.some((run, i) => run !== answer.runs[i] && !entries.has(run.id)))
						return fail({ code: "run_not_found", message: "The run was deleted" });
					runs = runs.map((run) => entries.run(run.id) ?? run);
					if (!runs.every(over)) return;
					const failed = runs.find(({ status }) => status === "failed");
					if (!failed) resolve(runs);
					fail({ ...failed?.last_error });
				};
				leave = join({ set, seen, fail, onstate, waits: true });
				// Aborted during the POST.
				if (signal?.aborted) cancel();
			}).catch(fail);
		});

	return {
		/**
		 * Resolves after the first `set`; `signal` ends it.
		 * @type {(thread_id: string, set: Setter, options?: StreamOptions) => Promise<Entry[]>}
		 */
		loadThread: (thread_id, set, { signal, onstate } = {}) =>
			new Promise((resolve, reject) => {
				need(typeof set === "function", "set must be a function", set);
				if (signal?.aborted) throw abortError();
				const leave = followed(thread_id).join({ set, seen: resolve, fail: reject, onstate });
				signal?.addEventListener("abort", () => { leave(); reject(abortError()); });
			}),

		/** @type {(thread_id: string, content: string, options?: Options) => Promise<Entry>} */
		addMessage: async (thread_id, content, { signal } = {}) =>
			(await call(`${at(thread_id)}messages`, { content }, signal))[0],

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
		createThread: async (metadata, { signal } = {}) => (await call("threads", { metadata }, signal))[0].id,
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

// ---------------------------------------------------------------- for the blueprint that serves this file

export const { loadThread, addMessage, run, addMessageAndRun, addMessageAndRuns, createThread } =
	createAssistream();
