"""All that is there only for speed: reading chunks, templates of events, reading in batches, sending directly.

Nothing in here changes what is read, stored or sent; it reaches further into other libraries than the rest may.
"""
