"""`dashinfer_bench`: loads any server that speaks OpenAI's API, and measures what its clients see; README.md here says how.

    target, settings, stats, exchange < client, prompts, pictures < questions, load < dataset, measure < report, plot
    < command < cli

Knows servers by their URL alone, so that peers are measured by the same code in the same run; of `dashinfer` it imports the
errors. `cli`, `settings` and `target` import nothing else that is not Python's own, so that `--help` and a mistyped flag answer
at once.
"""
