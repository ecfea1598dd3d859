"""The assistant of the demo: no model, but it reads what it is sent."""

from __future__ import annotations

import re

from ._replies import Reply, Request
from ._script_calls import calls_of, outputs

# Who speaks (words to look for in the instructions), the bodies and the closing lines, by turns.
_PERSONAS = (
    (
        r"\b(tutor|teach|explain|learn)",
        (
            """📘 **Let us take it step by step.** You wrote: “{last}”.

1. Say in one sentence what you know already.
2. Point at the word that puzzles you most.
3. Try the smallest example before the big one.""",
            """📘 **Good, one level deeper.** You wrote: “{last}”.

1. Compare it with something from your own day.
2. Ask what would happen if one part were missing.
3. Tell it to a friend — gaps show at once.""",
        ),
        (
            "`small example → pattern → rule` works for most things. Which of the three shall we start with?",
            "Write your own version first, then read on: that is how it stays. What would you try next?",
        ),
    ),
    (
        r"\b(critic|review|doubt|scept|skept|edit)",
        (
            """🔍 **Two doubts and a compliment.** On “{last}”:

- *Too wide:* a claim that fits everything explains nothing.
- *Untested:* what would you have to see to change your mind?
- The question itself is honest, and that is rarer than it should be.""",
            """🔍 **Better — but not there yet.** On “{last}”:

- The strongest point comes last; put it first.
- One number would say more than three adjectives.
- I’d cut the opening: it asks for patience before it has earned any.""",
        ),
        (
            "My verdict: keep the core, halve the rest, and name your source.",
            "My verdict: publishable after one more draft and a naïve reader’s questions.",
        ),
    ),
    (
        r"\b(poet|poem|verse|rhym|lyric)",
        (
            """🌙 You wrote “{last}”, and here it lingers:

> A word came softly through the wire,
> it warmed its hands at no one’s fire,
> it looked around, it stayed a while,
> and left the screen a little smile. ✨""",
            """🍂 Again your words — “{last}” — come in:

> They shake the rain from coat and hat,
> they ask for this, they ask for that;
> the clock says *tick*, the page says *stay*,
> and so we write one more today. 🎶""",
        ),
        (
            "Read it aloud: the commas are where you breathe.",
            "If a line limps, blame the metre — and try it in café light.",
        ),
    ),
    (
        r"\b(observatory|astronom|telescope)",
        (
            """🔭 **Clear skies.** You asked: “{last}”.

- What I say of planets and moons, I *look up*.
- What I book, you allow first.""",
            """🌌 **Back at the eyepiece.** You asked: “{last}”.

- The table is *short*: planets, and the largest moons.
- A night has room for one booking of yours.""",
        ),
        (
            "Numbers are only as good as the table they are from. What shall we look at next?",
            "The dome is open until dawn. Is there anything else to look up?",
        ),
    ),
    (
        "",
        (
            """👋 Hello! You wrote: “{last}”. Here is how I would go about it:

- **First** write down what a good result looks like.
- **Then** do the part that could fail.
- **Last** polish what people will see.""",
            """👍 Thank you, I have it: “{last}”. Three thoughts — none of them deep:

- **Small** steps are easier to undo.
- **Plain** words are easier to check.
- **Early** questions are cheaper than late ones.""",
        ),
        ("Tell me more, and I’ll give you the next step.", "Shall we go on with the first point, or the last?"),
    ),
)


def scripted(request: Request) -> Reply:
    """Give the default answer: some 60 to 130 words that depend on the instructions, the turn and the history.

    A tutor, a critic, a poet and an astronomer (by the words of the instructions, else by the assistant's name) answer
    differently. Where the request has functions, those that the user's last message names are called first: with JSON
    on a line of its own, as in ``call lookup {"query": "x"}``, or in words, as in "look up x", which become the
    arguments; the answer then tells what they gave. Each answer quotes the user's last message, names the turn and how
    many messages arrived, quotes
    the first message from the second turn on and the reply before it, if there is one after the user's message,
    and says that no model wrote it.
    """

    def quote(text: str, most: int = 80) -> str:
        text = " ".join(text.split())
        return text if len(text) <= most else text[: most - 1].rstrip() + "…"

    who = f"{request.instructions or request.model}".lower()
    _, bodies, ends = next(persona for persona in _PERSONAS if re.search(persona[0], who))
    # assistream sends another assistant's reply within a user's turn, between marks with its name.
    others = re.compile(r'<other-assistant name="[^"]*">\n(.*?)\n</other-assistant>', re.DOTALL)
    asked = [own for role, text in request.messages if role == "user" and (own := others.sub("", text).strip())]
    if calls := calls_of(request, asked[-1] if asked else ""):
        return Reply("", calls=calls)
    turn, count = max(len(asked), 1), len(request.messages)
    parts = [bodies[(turn - 1) % 2].format(last=quote(asked[-1]) if asked else "…")]
    if turn > 1:
        parts.append(f"It began with “{quote(asked[0])}”; I have not forgotten.")
    role, newest = request.messages[-1] if request.messages else ("", "")
    parts += [f"I have read the tool’s answer: “{quote(output, 400)}”." for output in outputs(request)]
    if role == "assistant" or newest.endswith("</other-assistant>"):
        parts.append(f"I have read the reply before mine: “{quote([newest, *others.findall(newest)][-1])}”.")
    parts.append(ends[(turn - 1) % 2])
    seen = f"{count} message{'s' if count != 1 else ''} seen"
    parts.append(f"_(Turn {turn}, {seen}. I am the offline assistant: a script, no model.)_")
    return Reply("\n\n".join(parts))
