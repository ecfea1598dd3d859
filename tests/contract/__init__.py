"""What others rely on, held for each implementation: routes, store, log, dialects, the offline server."""
