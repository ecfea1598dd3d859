"""What is sent to a model server and what comes back: a thread's items in, an answer's deltas out.

A dialect is a module, which dialects.py has by its name, and none of them knows of threads, logs or viewers.
"""
