"""What dev.py is made of, in the standard library only.

Lowest first: process, checks, environment, browser_package, browser, server, commands.
"""
