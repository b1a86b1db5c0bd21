"""
A server for the chat page and for OpenAI clients. A request passes these modules in turn: server
(the socket), guard (who may ask), app (the endpoints), requests (what is asked), prompts (its
tokens), call (its jobs), worker (which decodes), mailbox (the way back), answer (what a client sees
of a row) and bodies (the fields of the answer). models.py finds and loads models.
"""
