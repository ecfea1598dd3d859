"""What is deployed, and what it is deployed behind; the docs."""
