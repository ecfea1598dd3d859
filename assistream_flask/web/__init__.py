"""HTTP: the routes, what a request may say, the bodies of event streams, and the doctor that looks at a deployment.

Only the blueprint knows Flask here, and of what is below this room only the extension knows of requests.
"""
