"""How the editor and the API save a workflow: nodes, links, groups, subgraphs, and where they lie."""
