"""What any of our processes needs in order to run, and nothing about purchases.

Admission: at least two processes use it today; it names no table, event, queue or message of ours. At most
fifteen files and about 2,300 lines. This file imports nothing.
"""
