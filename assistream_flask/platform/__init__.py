"""What is known of the server below, gunicorn and gevent, and of the process that they give the app.

Nothing in here knows of threads, runs or events: it is what all else stands on.
"""
