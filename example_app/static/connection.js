// The line at the top that says how the thread reaches this page, or that a message is still being sent.
import { $ } from "./dom.js";

const STATES = {
  connecting: "Connecting…",
  unauthenticated: "You are signed out. Sign in again, in any tab, and this page goes on by itself.",
  polling: "Live text does not get through to you, so this page asks for news every few seconds.",
  paused: "Paused while other tabs are in use. It goes on when you look at it.",
};

export function createConnectionLine() {
  let stream = "live", sending = false, timer = 0;

  /** Says it, unless it turns out to be nothing to say before `ms` are over. */
  function saySoon(words, ms) {
    clearTimeout(timer);
    timer = setTimeout(() => say(words), ms);
  }

  function say(words) {
    clearTimeout(timer);
    $("connection").textContent = navigator.onLine ? words : "You are offline. Answers go on, and show when you are back.";
  }

  function sayStream() {
    say(stream === "connecting" ? "" : STATES[stream] ?? "");
    // A reconnect that is over in a second is nothing to say.
    if (stream === "connecting") saySoon(STATES.connecting, 1500);
  }

  addEventListener("online", sayStream);
  addEventListener("offline", sayStream);

  return {
    /** The stream of a thread that is opened now: nothing to say yet. */
    begin: (state) => { stream = state; },
    /** The stream's state, where it is another. While a message is being sent, that has the line. */
    update(state = stream) {
      stream = state;
      if (!sending) sayStream();
    },
    sending(on) {
      sending = on;
      if (on) saySoon("Still sending…", 3000);
      else sayStream();
    },
  };
}
