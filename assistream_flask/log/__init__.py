"""The per-thread event log: what every log does, the log in memory, and the log in Redis that workers share.

What both keep of a thread in this process is its buffer, which any number of readers go through with a cursor each.
"""
