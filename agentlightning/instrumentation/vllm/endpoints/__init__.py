"""Token ids in the answers: a module for each endpoint, and what several endpoints share.

`answer` decides which ids an answer carries, `endpoint` is common to chat and completions, `sse` edits streams, and
`fields` extends response models.
"""
