"""A run's life: queued, asked, read, told, stored, ended; and what a worker process has for all of its runs.

It joins the three rooms below, upstream, store and log, and knows nothing of HTTP.
"""
