//! Configurations for the node, from a template.

/// Replaces each `{name}` by its value; braces around anything else stay, for TOML's inline tables.
pub fn render(template: &str, values: &[(&str, &dyn std::fmt::Display)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| {
        text.replace(&format!("{{{name}}}"), &value.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::render;

    #[test]
    fn names_are_replaced_and_tables_stay() {
        let text =
            render("port = {port}\ntls = { ca = \"{ca}\" }", &[("port", &1883), ("ca", &"x")]);
        assert_eq!(text, "port = 1883\ntls = { ca = \"x\" }");
    }
}
