"""HTTP: the routes, what a request may say, the bodies of event streams, and the doctor that looks at a deployment.

Of what is below this room only the extension knows of requests.
"""
