"""The command line: `fastattn tune | explain | cache | doctor`.

One file for each command; `shape_words` reads what is asked, `tables` shows what was found.
"""
