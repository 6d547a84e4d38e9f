"""Which of Llumnix's experiments (Sun et al., OSDI'24) are done again, and what did its paper find?"""
