"""One file a version of the schema. What a release had in it never changes."""
