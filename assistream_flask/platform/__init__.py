"""What is known of gunicorn and gevent, the server below, of the process that they give the app, and of the SDK.

Nothing in here knows of threads, runs or events: it is what all else stands on.
"""
