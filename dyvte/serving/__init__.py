"""Answers to people and programs: one question in the terminal, a conversation, an OpenAI-compatible server.

`answerer` holds the model and says what a request's schedule is; `groups` generate rows together; `scheduler`
is the thread that owns the model while a server runs; `requests` and `replies` are the server's JSON; `app`
is the server; `page/` is what it shows to a browser.
"""
