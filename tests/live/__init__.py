"""Gunicorn, Redis and PostgreSQL, in processes of their own."""
