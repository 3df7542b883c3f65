"""What runs found: tables over seeds, figures, the most suspect images, and one page that holds it all.

Reads finished folders only; nothing that trains may import it, since it reads the truth. Its modules are imported from
where they are needed (`page.write_report`, `tables.format_results`): ``dbd report --help`` loads none of them.
"""
