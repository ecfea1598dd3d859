// Whatever happens between a page and its server, in the end the page shows what the server has.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createAssistream } from "../../../assistream_flask/static/assistream.js";
import { Page, Server, recorder, seeded } from "./fakes.mjs";

const TRIALS = Number(process.env.ASSISTREAM_TRIALS ?? 1000);
const FIRST = Number(process.env.ASSISTREAM_SEED ?? 1);

/** Every text is "0 1 2 3 ...", so that a lost or a doubled delta shows at once. */
const checkTexts = (entries) => {
  for (const { message, run } of entries) {
    if (message.role !== "assistant") continue;
    assert.ok(run, "an assistant's entry without its run");
    const value = message.content.map((part) => part.text?.value ?? part.refusal).join("");
    const wanted = value.split(" ").slice(0, -1).map((_, i) => `${i} `).join("");
    assert.ok(value === wanted || value.startsWith(wanted), `deltas lost or doubled: ${value}`);
  }
};

const trial = async (seed) => {
  const random = seeded(seed);
  const chance = (p) => random() < p;
  const pick = (list) => list[Math.floor(random() * list.length)];
  const page = new Page({ seed });
  try {
    const server = new Server();
    const slow = pick([1, 10, 100]);
    server.delay = () => Math.floor(random() * slow);
    server.page = pick([1, 2, 3, 50]);
    let calm = false;
    const bad = pick([0, 0.1, 0.4]);
    server.failOpen = () => !calm && chance(bad);
    server.fault = ({ method }) => {
      if (calm || !chance(bad)) return undefined;
      return pick(["refuse", "lose", 502, 503, [503, { "Retry-After": "2" }, { error: { code: "shutting_down", message: "Later." } }],
        ...(method === "GET" ? [500, 429, [429, { "Retry-After": "1" }]] : [])]);
    };
    const strange = pick([0, 0, 0.02]);
    server.twist = () => (!calm && chance(strange) ? pick(["skip", "repeat", "mute"]) : undefined);
    const held = pick([0, 0, 0.2, 1]);
    server.holds = () => !calm && chance(held);
    // Another tab, which comes and goes, and may vanish without a word.
    const other = new BroadcastChannel("assistream http://server.test");
    const names = ["a", "b"].slice(0, chance(0.3) ? 2 : 1);
    const counts = new Map();
    for (const name of names) {
      const thread = server.thread(name);
      for (let i = Math.floor(random() * 14); i > 0; i--) chance(0.4) ? server.start(thread, "w") : server.say(thread, `old ${i}`);
    }
    const tabs = [0, 1].slice(0, chance(0.4) ? 2 : 1).map(() =>
      createAssistream({ baseUrl: "http://server.test/p/", fetch: server.fetch, EventSource: server.EventSource }));
    const views = [];
    const runs = [];
    const failures = [];
    const allowed = new Set(["AbortError", "worker_lost", "upstream_error", "run_not_found", "network_error", "shutting_down"]);
    const settle = (promise, view) => {
      const state = { over: false };
      runs.push(state);
      promise.then(
        (done) => {
          state.over = true;
          for (const run of [done].flat()) {
            const shown = view?.set.last?.find((entry) => entry.run?.id === run.id)?.run;
            if (view && shown) assert.equal(shown.status, run.status, "settled before set had the final state");
          }
        },
        (error) => {
          state.over = true;
          if (!allowed.has(error.name) && !allowed.has(error.code)) failures.push(error);
        },
      ).catch((error) => failures.push(error));
    };
    /** By call id: the signals of all that executed it. */
    const working = new Map();
    const tools = {
      pick: async (args, { signal, call }) => {
        const others = (working.get(call.id) ?? []).filter(({ aborted }) => !aborted);
        if (others.length >= server.grants.get(call.id)) failures.push(new Error("a call executed twice under one claim"));
        working.set(call.id, [...others, signal]);
        await new Promise((resolve) => setTimeout(resolve, random() * 200));
        if (chance(0.1)) throw new Error("no calendar");
        return args.n;
      },
    };
    const load = ({ tab, name, set, stop, tools }) => tab.loadThread(name, set, { signal: stop.signal, tools });
    const subscribe = () => {
      const view = { name: pick(names), tab: pick(tabs), stop: new AbortController(), set: recorder(page),
        tools: chance(0.7) ? tools : undefined };
      views.push(view);
      load(view).catch((error) => {
        if (error.name !== "AbortError") failures.push(error);
      });
    };
    subscribe();
    const actions = [
      () => subscribe(),
      () => {
        const view = pick(views);
        view.stop.abort();
        view.set.fresh = true;
        view.stop = new AbortController();
        view.gone = view.set.loose = chance(0.5);
        if (!view.gone) load(view).catch(() => {});
      },
      () => {
        const view = pick(views);
        const stop = new AbortController();
        settle(view.tab.addMessageAndRuns(view.name, "hello", ["x", "y"], view.gone ? null : view.set, { signal: stop.signal }),
          view.gone ? null : view);
        if (chance(0.3)) setTimeout(() => stop.abort(), random() * 300);
      },
      () => { const { tab, name } = pick(views); tab.addMessage(name, "note").catch((error) => {
        if (!allowed.has(error.code)) failures.push(error); }); },
      () => server.say(server.threads.get(pick(names)), "another tab's"),
      () => server.start(server.threads.get(pick(names)), "z"),
      () => { for (const source of [...server.sources]) if (chance(0.7)) server.cut(source); },
      () => { const source = pick([...server.sources]); if (source) server.snapshot(source); },
      () => server.trim(server.threads.get(pick(names)), Math.floor(random() * 4)),
      () => { if (chance(0.4)) server.lose(server.threads.get(pick(names)), chance(0.5)); },
      () => page.hide(chance(0.5)),
      () => page.fire(pick(["online", "pageshow"])),
      () => server.ping(),
      // Another person decides, or another device answers.
      () => {
        const thread = server.threads.get(pick(names));
        const entry = thread.entries.find(({ run }) => run?.required_action);
        if (!entry) return;
        const { id, needs } = pick(entry.run.required_action.submit_tool_outputs.tool_calls);
        server.answer(thread, entry, needs, [{ tool_call_id: id, approve: chance(0.5), output: "here", arguments: chance(0.3) ? {} : undefined }]);
      },
      () => other.postMessage({ id: "other", streams: pick([0, 2, 5]), hidden: pick([0, page.now]), ask: chance(0.2) }),
      () => { page.fire("pagehide"); page.hide(true); },
      () => { if (chance(0.2)) page.sleep(60_000); },
    ];
    /** The model calls a tool or several, and those are executed, or waited for. */
    const calls = (thread, entry) => {
      const needs = {};
      for (let i = random() * 3; i > 0; i--) {
        const what = pick(["", "output", "approval"]);
        const id = server.call(thread, entry, what === "output" ? "pick" : "find", what === "output" ? "page" : "server");
        for (const piece of ['{"n"', ": 1", "}"]) server.grow(thread, entry, id, { arguments: piece });
        if (what) needs[id] = what;
        else server.grow(thread, entry, id, { status: "completed", output: "found", completed_at: 1 });
      }
      if (Object.keys(needs).length) server.require(thread, entry, needs);
    };
    const work = (most) => {
      for (const thread of server.threads.values())
        for (const entry of thread.entries) {
          const { run, message } = entry;
          if (!run || !["queued", "in_progress"].includes(run.status) || chance(0.3)) continue;
          if (run.status === "queued") server.begin(thread, entry);
          for (let i = random() * most; i > 1; i--) {
            const said = message.content.map((part) => part.text?.value ?? part.refusal).join("").split(" ").length - 1;
            server.delta(thread, entry, `${said} `, chance(0.05) ? "refusal" : message.content.at(-1)?.type ?? "text");
            if (chance(0.1)) server.think(thread, entry, `${i} `);
          }
          if (chance(0.1)) calls(thread, entry);
          else if (chance(0.05)) server.finish(thread, entry, pick(["completed", "completed", "incomplete", "failed", "expired"]));
        }
    };
    for (let i = 0; i < 25; i++) {
      if (chance(0.6)) pick(actions)();
      work(6);
      await page.pass(Math.floor(random() * pick([3, 30, 600])));
      for (const { set } of views) if (set.last) checkTexts(set.last);
    }
    // All is well again: everything ends, everything arrives.
    calm = true;
    page.hide(false);
    page.fire("pageshow");
    // A hole shows at the next event.
    for (const thread of server.threads.values()) server.say(thread, "bye");
    for (let i = 0; i < 8; i++) {
      server.ping();
      for (const thread of server.threads.values())
        for (const entry of thread.entries)
          if (entry.run && ["queued", "in_progress"].includes(entry.run.status)) server.finish(thread, entry);
      await page.pass(12_000);
    }
    // What waits for a person, or for a page that is not there, waits.
    for (const thread of server.threads.values())
      for (const entry of thread.entries) {
        const waiting = entry.run?.required_action?.submit_tool_outputs.tool_calls ?? [];
        const has = views.some(({ name, gone, tools }) => name === thread.id && !gone && tools);
        assert.ok(!has || waiting.every(({ needs }) => needs === "approval"), "a call that no page executed");
        if (waiting.length) server.finish(thread, entry, "cancelled");
      }
    await page.pass(1000);
    assert.deepEqual(failures, []);
    assert.deepEqual(page.reported, []);
    assert.ok(runs.every((run) => run.over), "a run's promise never settled");
    for (const { name, set, gone } of views)
      if (!gone) assert.deepEqual(set.last, server.threads.get(name).entries, "a view differs from the server");
    for (const view of views) view.stop.abort();
    // As long as a request may still be under way.
    await page.pass(300);
    assert.equal(server.sources.size, 0, "a stream without a user");
    assert.equal(page.timers, 0, "a timer without a user");
    assert.equal(page.channels, 1, "a channel without a user");
  } catch (error) {
    error.message = `trial ${seed}: ${error.message}`;
    throw error;
  } finally {
    page.close();
  }
};

test(`any interleaving ends with what the server has (${TRIALS} trials)`, async () => {
  for (let seed = FIRST; seed < FIRST + TRIALS; seed++) await trial(seed);
});
