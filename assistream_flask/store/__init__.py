"""What an app keeps of its threads, messages and runs: the statements, the tables, and the database that they are in.

Only this room speaks SQL; who holds a run, and until when, is kept here too, by the database's clock.
"""
