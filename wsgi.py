"""`gunicorn wsgi:app` serves the example app; `flask --app wsgi run` does too."""

from example_app import create_app

app = create_app()
