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
export type Part = {
    type: "text";
    text: {
        value: string;
        annotations: any[];
    };
} | {
    type: "refusal";
    refusal: string;
};
export type Message = {
    id: string;
    created_at: number;
    role: "user" | "assistant";
    content: Part[];
    status: "in_progress" | "completed" | "incomplete";
    incomplete_details: {
        reason: string;
    } | null;
    assistant_id: string | null;
    run_id: string | null;
    metadata: Record<string, any>;
    [more: string]: any;
};
export type Run = {
    id: string;
    status: "queued" | "in_progress" | "requires_action" | "completed" | "incomplete" | "failed" | "cancelled" | "expired";
    last_error: {
        code: string;
        message: string;
    } | null;
    required_action: RequiredAction | null;
    [more: string]: any;
};
export type RequiredAction = {
    type: string;
    submit_tool_outputs: {
        tool_calls: RequiredCall[];
    };
};
export type RequiredCall = {
    id: string;
    type: "function";
    function: {
        name: string;
        arguments: string;
    };
    needs: "output" | "approval";
};
export type ToolCall = {
    id: string;
    type: string;
    kind: "server" | "page" | "hosted";
    status: "in_progress" | "requires_action" | "completed" | "failed" | "denied" | "interrupted";
    error: string | null;
    started_at: number | null;
    completed_at: number | null;
    function: {
        name: string;
        arguments: string;
        output: string | null;
    };
    [more: string]: any;
};
export type Step = {
    id: string;
    type: "reasoning" | "tool_calls";
    status: string;
    content_index: number;
    step_details: any;
    [more: string]: any;
};
export type Entry = {
    assistant_id: string | null;
    message: Message;
    run: Run | null;
    steps: Step[];
};
export type Setter = (entries: Entry[]) => void;
export type Thread = {
    id: string;
    created_at: number;
    metadata: Record<string, any>;
    [more: string]: any;
};
export type Assistant = {
    id: string;
    name: string;
    description: string;
};
export type Options = {
    signal?: AbortSignal;
};
export type AssistreamError = Error & {
    code: string;
    status?: number;
    runs?: Run[];
    decision?: any;
};
export type Tools = Record<string, (args: any, about: {
    signal: AbortSignal;
    call: RequiredCall;
}) => any>;
export type State = "live" | "connecting" | "unauthenticated" | "polling" | "paused";
export type StreamOptions = Options & {
    onstate?: (state: State) => void;
    tools?: Tools;
};
export type Slot = {
    entry: Entry;
    offset: number;
    index: number;
};
export type Subscriber = {
    set?: any;
    seen: (shown: Entry[]) => void;
    fail: (error: any) => void;
    onstate?: (state: State) => void;
    tools?: Tools;
    waits?: boolean;
    state?: State;
};
export type CopyNeeds = {
    older: (message_id: string) => Promise<any[]>;
    progress: () => void;
    changed: (urgent?: boolean) => void;
    restart: () => void;
    end: (error: any) => void;
};
/**
 * For a copy of this file: `baseUrl` is where the blueprint is.
 * @param {{baseUrl?: string, fetch?: typeof fetch, EventSource?: typeof EventSource}} [options]
 */
export declare const createAssistream: (options?: {
    baseUrl?: string;
    fetch?: typeof fetch;
    EventSource?: typeof EventSource;
}) => {
    /**
     * Calls `set` now and on every change, with the whole thread as a new array, once a frame at most. An entry that
     * did not change is the same object as before: never modify them. Resolves after the first `set`; `signal` ends
     * it.
     * @type {(thread_id: string, set: Setter, options?: StreamOptions) => Promise<Entry[]>}
     */
    loadThread: (thread_id: string, set: Setter, options?: StreamOptions) => Promise<Entry[]>;
    /** @type {(thread_id: string, content: string, options?: Options) => Promise<Entry>} */
    addMessage: (thread_id: string, content: string, options?: Options) => Promise<Entry>;
    /**
     * Resolves when it is over; `signal` cancels it.
     * @type {(thread_id: string, assistant_id: string, set?: Setter | null, options?: StreamOptions) => Promise<Run>}
     */
    run: (thread_id: string, assistant_id: string, set?: Setter | null, options?: StreamOptions) => Promise<Run>;
    /**
     * @type {(thread_id: string, content: string, assistant_id: string, set?: Setter | null,
     *   options?: StreamOptions) => Promise<Run>}
     */
    addMessageAndRun: (thread_id: string, content: string, assistant_id: string, set?: Setter | null, options?: StreamOptions) => Promise<Run>;
    /**
     * @type {(thread_id: string, content: string, assistant_ids: string[], set?: Setter | null,
     *   options?: StreamOptions & {mode?: "parallel" | "sequential"}) => Promise<Run[]>}
     */
    addMessageAndRuns: (thread_id: string, content: string, assistant_ids: string[], set?: Setter | null, options?: StreamOptions & {
        mode?: "parallel" | "sequential";
    }) => Promise<Run[]>;
    /** @type {(metadata?: object, options?: Options) => Promise<string>} */
    createThread: (metadata?: object, options?: Options) => Promise<string>;
    /**
     * The user's own threads, newest first: those made before the thread `before`, `limit` of them.
     * @type {(options?: Options & {limit?: number, before?: string}) => Promise<{data: Thread[], has_more: boolean}>}
     */
    listThreads: (options?: Options & {
        limit?: number;
        before?: string;
    }) => Promise<{
        data: Thread[];
        has_more: boolean;
    }>;
    /**
     * Resolves when the thread is gone, with all that is in it. Who shows it gets an empty array.
     * @type {(thread_id: string, options?: Options) => Promise<void>}
     */
    deleteThread: (thread_id: string, options?: Options) => Promise<void>;
    /** @type {(options?: Options) => Promise<Assistant[]>} */
    listAssistants: (options?: Options) => Promise<Assistant[]>;
    /**
     * Cancels a run, whoever started it, and resolves with it; one that is over stays as it is.
     * @type {(thread_id: string, run_id: string, options?: Options) => Promise<Run>}
     */
    cancelRun: (thread_id: string, run_id: string, options?: Options) => Promise<Run>;
    /**
     * Answers tool calls that wait for the page's output, all or none, and resolves with the run; the last answer has
     * it go on. An output that is no string is sent as JSON. Rejects with the code `already_answered`, and how, where
     * a call was answered before.
     * @type {(thread_id: string, run_id: string, outputs: {tool_call_id: string, output: any}[], options?: Options) =>
     *   Promise<Run>}
     */
    submitToolOutputs: (thread_id: string, run_id: string, outputs: {
        tool_call_id: string;
        output: any;
    }[], options?: Options) => Promise<Run>;
    /**
     * Allows a tool call, with other `arguments` where they are given; `remember` allows its tool for the rest of the
     * thread. Resolves and rejects as `submitToolOutputs` does.
     * @type {(thread_id: string, run_id: string, call_id: string,
     *   options?: Options & {arguments?: object, remember?: boolean}) => Promise<Run>}
     */
    approve: (thread_id: string, run_id: string, call_id: string, options?: Options & {
        arguments?: object;
        remember?: boolean;
    }) => Promise<Run>;
    /**
     * Does not allow a tool call; the model is told the reason. Resolves and rejects as `submitToolOutputs` does.
     * @type {(thread_id: string, run_id: string, call_id: string, options?: Options & {reason?: string}) => Promise<Run>}
     */
    deny: (thread_id: string, run_id: string, call_id: string, options?: Options & {
        reason?: string;
    }) => Promise<Run>;
};
/**
 * What an entry says: its texts and refusals, a blank line between two. Joined without, two messages of one answer
 * would be one sentence.
 * @type {(entry: Entry) => string}
 */
export declare const text: (entry: Entry) => string;
/**
 * What an entry consists of, in the order in which it happened: texts, refusals, reasoning and tool calls. `key` stays
 * the same while a part grows.
 * @type {(entry: Entry) => ({key: string, type: "text" | "refusal", part: Part} |
 *   {key: string, type: "reasoning", text: string, step: Step} |
 *   {key: string, type: "tool_call", call: ToolCall, step: Step})[]}
 */
export declare const parts: (entry: Entry) => ({
    key: string;
    type: "text" | "refusal";
    part: Part;
} | {
    key: string;
    type: "reasoning";
    text: string;
    step: Step;
} | {
    key: string;
    type: "tool_call";
    call: ToolCall;
    step: Step;
})[];
export declare const loadThread: (thread_id: string, set: Setter, options?: StreamOptions) => Promise<Entry[]>, addMessage: (thread_id: string, content: string, options?: Options) => Promise<Entry>, run: (thread_id: string, assistant_id: string, set?: Setter | null, options?: StreamOptions) => Promise<Run>, addMessageAndRun: (thread_id: string, content: string, assistant_id: string, set?: Setter | null, options?: StreamOptions) => Promise<Run>, addMessageAndRuns: (thread_id: string, content: string, assistant_ids: string[], set?: Setter | null, options?: StreamOptions & {
    mode?: "parallel" | "sequential";
}) => Promise<Run[]>, createThread: (metadata?: object, options?: Options) => Promise<string>, listThreads: (options?: Options & {
    limit?: number;
    before?: string;
}) => Promise<{
    data: Thread[];
    has_more: boolean;
}>, deleteThread: (thread_id: string, options?: Options) => Promise<void>, listAssistants: (options?: Options) => Promise<Assistant[]>, cancelRun: (thread_id: string, run_id: string, options?: Options) => Promise<Run>, submitToolOutputs: (thread_id: string, run_id: string, outputs: {
    tool_call_id: string;
    output: any;
}[], options?: Options) => Promise<Run>, approve: (thread_id: string, run_id: string, call_id: string, options?: Options & {
    arguments?: object;
    remember?: boolean;
}) => Promise<Run>, deny: (thread_id: string, run_id: string, call_id: string, options?: Options & {
    reason?: string;
}) => Promise<Run>;
