def looks_like(state):
    return ''
