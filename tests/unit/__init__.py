"""A part of the package, or an app of it, within the test's process. Its model server is a thread."""
