//! Text for terminals: somebody else's names and logs must not command the terminal that shows them.

use std::borrow::Cow;
use std::iter::Peekable;
use std::str::Chars;

/// A text without colours, titles, links and other control characters, which stand between its words. Tabs stay.
pub fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(is_command) {
        return Cow::Borrowed(text);
    }
    let (mut kept, mut letters) = (String::with_capacity(text.len()), text.chars().peekable());
    while let Some(letter) = letters.next() {
        match letter {
            '\u{1b}' => {
                match letters.next_if(|next| ('['..=']').contains(next) || matches!(next, 'P' | 'X' | '^' | '_')) {
                    Some('[') => sequence(&mut letters),
                    Some('\\') => {}
                    Some(_) => words(&mut letters),
                    None => {
                        while letters.next_if(|next| (' '..='/').contains(next)).is_some() {}
                        letters.next_if(|next| ('0'..='~').contains(next));
                    }
                }
            }
            '\u{9b}' => sequence(&mut letters),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => words(&mut letters),
            letter if is_command(letter) => {}
            letter => kept.push(letter),
        }
    }
    Cow::Owned(kept)
}

/// Control characters, and those that turn the direction of what follows.
fn is_command(letter: char) -> bool {
    (letter.is_control() && letter != '\t')
        || matches!(letter, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The rest of a control sequence: parameters, then one letter (ECMA-48, section 5.4).
fn sequence(letters: &mut Peekable<Chars<'_>>) {
    while letters.next_if(|next| (' '..='?').contains(next)).is_some() {}
    letters.next_if(|next| ('@'..='~').contains(next));
}

/// The rest of a command that has words in it, with its end: BEL, or ST in either form (section 5.6).
fn words(letters: &mut Peekable<Chars<'_>>) {
    while letters.next_if(|next| !next.is_control()).is_some() {}
    if letters.next_if(|next| matches!(next, '\u{7}' | '\u{9c}')).is_none() && letters.peek() == Some(&'\u{1b}') {
        let mut ahead = letters.clone();
        ahead.next();
        if ahead.next() == Some('\\') {
            *letters = ahead;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_go_and_words_stay() {
        for (text, left) in [
            ("a\tb", "a\tb"),
            ("\u{1b}[1;38;5;208mred\u{1b}[m\u{7}", "red"),
            ("\u{9b}31mred\u{9b}0m", "red"),
            ("\u{1b}]0;title\u{7}text", "text"),
            ("\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{1b}\\ on", "link on"),
            ("\u{9d}8;;x\u{9c}link", "link"),
            ("\u{1b}P1$r\u{1b}\\x\u{1b}_y\u{1b}\\z", "xz"),
            ("1.2.3.4:5\u{1b}(B", "1.2.3.4:5"),
            ("\u{1b}7\u{1b}8x\u{1b}=y", "xy"),
            ("\u{202e}evil\u{2066}", "evil"),
            ("\u{1b}", ""),
            ("\u{1b}[", ""),
            ("\u{1b}]never ended", ""),
            ("\u{1b}]cut by another\u{1b}[31mred", "red"),
        ] {
            assert_eq!(plain(text), left, "{text:?}");
        }
    }
}
