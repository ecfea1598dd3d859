"""HTTP: the routes, what a request may say, the bodies of event streams, and the doctor that looks at a deployment.

Only the blueprint knows Flask, and nothing below this room knows of requests.
"""
