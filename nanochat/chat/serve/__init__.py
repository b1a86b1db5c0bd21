"""
A server for the chat page and for OpenAI clients: what is asked (requests), who may ask (guard),
who answers (worker), and the routes (app).
"""
