//! What a word without quotes means: YAML 1.1 as Kubernetes and PyYAML read it, where it matters.

use crate::value::Value;

/// The meaning of a plain scalar.
pub(crate) fn resolve(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.starts_with(|first: char| first.is_ascii_digit() || first == '.') {
        return Value::Text(text.to_owned());
    }
    // A sign behind the prefix is none.
    if let Some(hex) = digits.strip_prefix("0x")
        && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
        && let Ok(number) = i64::from_str_radix(hex, 16)
    {
        return Value::Integer(if text.starts_with('-') { -number } else { number });
    }
    if digits.bytes().all(|byte| byte.is_ascii_digit())
        && let Ok(number) = text.parse()
    {
        return Value::Integer(number);
    }
    let is_float = digits.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'));
    match text.parse::<f64>() {
        Ok(number) if is_float && number.is_finite() => Value::Float(number),
        _ => Value::Text(text.to_owned()),
    }
}

/// Whether a text can stand without quotes and mean itself, to YAML 1.1's readers too.
pub(crate) fn is_plain(text: &str) -> bool {
    let words = ["y", "n", "yes", "no", "on", "off"];
    let first = text.chars().next();
    let safe = |letter: char| {
        letter.is_ascii_alphanumeric()
            || matches!(letter, '_' | '-' | '.' | '/' | ':' | '=' | '+' | '@' | ',' | '$' | '(' | ')')
    };
    first.is_some_and(|first| first.is_ascii_alphabetic() || matches!(first, '/' | '_' | '$'))
        && text.chars().all(safe)
        && !text.ends_with(':')
        && !words.contains(&text.to_ascii_lowercase().as_str())
        && matches!(resolve(text), Value::Text(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_numbers_have_one_sign_at_most() {
        assert!(matches!(resolve("-0x10"), Value::Integer(-16)));
        for text in ["0x-5", "-0x-8000000000000000", "0x+5", "0x"] {
            assert!(matches!(resolve(text), Value::Text(_)), "{text}");
        }
    }
}
