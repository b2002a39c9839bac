"""fastattn inside other libraries: one module for each, imported by whoever uses that library.

`import fastattn.integrations.transformers` makes attn_implementation="fastattn" known to Hugging Face transformers. Importing
`fastattn` imports none of them, and they import their library alone. They use dispatch's public functions and masks; nothing
but cli may use them.
"""
