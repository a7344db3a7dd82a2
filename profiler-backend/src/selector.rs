//! The query selector: `{container="cart", comm=~"worker.*", unit!=""}`.
//!
//! The grammar is Prometheus's instant vector selector without a metric name. A label name is `[a-zA-Z_][a-zA-Z0-9_]*`
//! or a quoted string (sample labels may carry any name); regular expressions are anchored at both ends; a label
//! that is absent equals the empty string. Source: prometheus.io/docs/prometheus/latest/querying/basics.

use std::fmt;

use regex::Regex;

/// Longest selector that is read, in bytes.
pub(crate) const SELECTOR_BYTES_MAX: usize = 8 << 10;
/// Most matchers in one selector.
pub(crate) const MATCHERS_MAX: usize = 64;
/// Largest compiled form of one regular expression, in bytes: bounds the memory a query can ask for.
const REGEX_BYTES_MAX: usize = 1 << 20;

/// Why a selector was not understood; positions are byte offsets into the text, from 0.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SelectorError {
    #[error("{bytes} bytes, more than {SELECTOR_BYTES_MAX}")]
    TooLong { bytes: usize },
    #[error("more than {MATCHERS_MAX} matchers")]
    TooManyMatchers,
    #[error("at {at}: expected {expected}, found {found}")]
    Unexpected { at: usize, expected: &'static str, found: Found },
    #[error("at {at}: string is not closed")]
    OpenString { at: usize },
    #[error("at {at}: unknown escape \\{escape}")]
    Escape { at: usize, escape: char },
    #[error("at {at}: {message}")]
    Regex { at: usize, message: String },
}

/// What stands where something else was expected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    End,
    Char(char),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::End => f.write_str("the end"),
            Found::Char(c) => write!(f, "{c:?}"),
        }
    }
}

/// A conjunction of matchers; without any it selects everything.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selector {
    pub(crate) matchers: Vec<Matcher>,
}

#[derive(Debug, Clone)]
pub(crate) struct Matcher {
    pub(crate) name: String,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Equal(String),
    NotEqual(String),
    Matches(Regex),
    MatchesNot(Regex),
}

impl Matcher {
    /// Whether a label with this value passes; an absent label is passed as `""`.
    pub(crate) fn accepts(&self, value: &str) -> bool {
        match &self.test {
            Test::Equal(text) => value == text,
            Test::NotEqual(text) => value != text,
            Test::Matches(regex) => regex.is_match(value),
            Test::MatchesNot(regex) => !regex.is_match(value),
        }
    }
}

impl Selector {
    /// Reads a selector. Empty text, `{}` and a list without braces are accepted.
    pub(crate) fn parse(text: &str) -> Result<Self, SelectorError> {
        if text.len() > SELECTOR_BYTES_MAX {
            return Err(SelectorError::TooLong { bytes: text.len() });
        }
        let mut parser = Parser { text, at: 0 };
        let matchers = parser.selector()?;
        Ok(Self { matchers })
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn selector(&mut self) -> Result<Vec<Matcher>, SelectorError> {
        self.skip_spaces();
        let braces = self.eat('{');
        let mut matchers = Vec::new();
        loop {
            self.skip_spaces();
            if self.at_end(braces)? {
                return Ok(matchers);
            }
            if matchers.len() == MATCHERS_MAX {
                return Err(SelectorError::TooManyMatchers);
            }
            matchers.push(self.matcher()?);
            self.skip_spaces();
            if !self.eat(',') {
                return match self.at_end(braces)? {
                    true => Ok(matchers),
                    false => Err(self.unexpected(if braces { "',' or '}'" } else { "',' or the end" })),
                };
            }
        }
    }

    /// Consumes the end of the list, if it is here, and checks that nothing follows.
    fn at_end(&mut self, braces: bool) -> Result<bool, SelectorError> {
        if !braces {
            return Ok(self.peek().is_none());
        }
        if !self.eat('}') {
            return Ok(false);
        }
        self.skip_spaces();
        match self.peek() {
            None => Ok(true),
            Some(_) => Err(self.unexpected("the end")),
        }
    }

    fn matcher(&mut self) -> Result<Matcher, SelectorError> {
        let name = self.name()?;
        self.skip_spaces();
        let operator = self.operator()?;
        self.skip_spaces();
        let value_at = self.at;
        let value = self.string("a quoted string")?;
        let test = match operator {
            Operator::Equal => Test::Equal(value),
            Operator::NotEqual => Test::NotEqual(value),
            Operator::Matches => Test::Matches(anchored(&value, value_at)?),
            Operator::MatchesNot => Test::MatchesNot(anchored(&value, value_at)?),
        };
        Ok(Matcher { name, test })
    }

    fn name(&mut self) -> Result<String, SelectorError> {
        if matches!(self.peek(), Some('"' | '\'')) {
            return self.string("a label name");
        }
        let rest = self.rest();
        let length = rest
            .char_indices()
            .find(|&(i, c)| !(c == '_' || c.is_ascii_alphabetic() || (i > 0 && c.is_ascii_digit())))
            .map_or(rest.len(), |(i, _)| i);
        if length == 0 {
            return Err(self.unexpected("a label name"));
        }
        let name = rest.get(..length).unwrap_or_default().to_owned();
        self.at += length;
        Ok(name)
    }

    fn operator(&mut self) -> Result<Operator, SelectorError> {
        // Longest first: "=" is a prefix of "=~".
        let table = [
            ("=~", Operator::Matches),
            ("!~", Operator::MatchesNot),
            ("!=", Operator::NotEqual),
            ("=", Operator::Equal),
        ];
        for (text, operator) in table {
            if self.rest().starts_with(text) {
                self.at += text.len();
                return Ok(operator);
            }
        }
        Err(self.unexpected("=, !=, =~ or !~"))
    }

    fn string(&mut self, expected: &'static str) -> Result<String, SelectorError> {
        let start = self.at;
        let quote = match self.peek() {
            Some(c @ ('"' | '\'' | '`')) => c,
            _ => return Err(self.unexpected(expected)),
        };
        self.at += quote.len_utf8();
        let mut value = String::new();
        while let Some(c) = self.next() {
            match c {
                c if c == quote => return Ok(value),
                // Backquoted strings are raw, as in Go.
                '\\' if quote != '`' => value.push(self.escape(start)?),
                c => value.push(c),
            }
        }
        Err(SelectorError::OpenString { at: start })
    }

    fn escape(&mut self, string_at: usize) -> Result<char, SelectorError> {
        let at = self.at.saturating_sub(1);
        match self.next() {
            Some('n') => Ok('\n'),
            Some('t') => Ok('\t'),
            Some('r') => Ok('\r'),
            Some(c @ ('\\' | '"' | '\'')) => Ok(c),
            Some(escape) => Err(SelectorError::Escape { at, escape }),
            None => Err(SelectorError::OpenString { at: string_at }),
        }
    }

    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.at += wanted.len_utf8();
        }
        found
    }

    fn skip_spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn unexpected(&self, expected: &'static str) -> SelectorError {
        let found = self.peek().map_or(Found::End, Found::Char);
        SelectorError::Unexpected { at: self.at, expected, found }
    }
}

#[derive(Clone, Copy)]
enum Operator {
    Equal,
    NotEqual,
    Matches,
    MatchesNot,
}

fn anchored(pattern: &str, at: usize) -> Result<Regex, SelectorError> {
    // Compiled alone first: in "a)|(b" the anchors' group would otherwise close early and change the meaning.
    let compile = |pattern: &str| {
        regex::RegexBuilder::new(pattern).size_limit(REGEX_BYTES_MAX).dot_matches_new_line(true).build()
    };
    compile(pattern).and_then(|_| compile(&format!("^(?:{pattern})$"))).map_err(|error| {
        let message = error.to_string();
        let line = message.lines().last().unwrap_or_default();
        SelectorError::Regex { at, message: line.trim_start_matches("error: ").to_owned() }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(selector: &str, label: (&str, &str), accepted: bool) {
        let selector = Selector::parse(selector).expect("selector in a test");
        let (name, value) = label;
        let value_of = |wanted: &str| if wanted == name { value } else { "" };
        let passes = selector.matchers.iter().all(|m| m.accepts(value_of(&m.name)));
        assert_eq!(passes, accepted, "{selector:?} on {name}={value:?}");
    }

    #[track_caller]
    fn check_error(selector: &str, message: &str) {
        let error = Selector::parse(selector).expect_err("selector must be refused");
        assert_eq!(error.to_string(), message, "for {selector:?}");
    }

    #[test]
    fn every_operator_matches_as_in_prometheus() {
        check("", ("a", "x"), true);
        check(" { } ", ("a", "x"), true);
        check(r#"{a="x"}"#, ("a", "x"), true);
        check(r#"{a="x"}"#, ("a", "xx"), false);
        check(r#"a="x""#, ("a", "x"), true);
        check(r#"{a!="x",}"#, ("a", "y"), true);
        check(r#"{a=~"wor.*"}"#, ("a", "worker"), true);
        check(r#"{a=~"ork"}"#, ("a", "worker"), false);
        check(r#"{a=~"x|y"}"#, ("a", "xz"), false);
        check(r#"{a!~"x|y"}"#, ("a", "z"), true);
        check(r#"{"http.route"='/a'}"#, ("http.route", "/a"), true);
        check(r#"{a="say \"hi\"\n"}"#, ("a", "say \"hi\"\n"), true);
        check(r"{a=~`\d+`}", ("a", "12"), true);
    }

    #[test]
    fn an_absent_label_equals_the_empty_string() {
        check(r#"{b=""}"#, ("a", "x"), true);
        check(r#"{b!=""}"#, ("a", "x"), false);
        check(r#"{b=~".*"}"#, ("a", "x"), true);
        check(r#"{b!="x"}"#, ("a", "x"), true);
    }

    #[test]
    fn errors_name_the_position_and_what_was_expected() {
        check_error(r#"{a="x""#, "at 6: expected ',' or '}', found the end");
        check_error(r#"{a="x"#, "at 3: string is not closed");
        check_error(r#"{a>"x"}"#, "at 2: expected =, !=, =~ or !~, found '>'");
        check_error(r#"{1a="x"}"#, "at 1: expected a label name, found '1'");
        check_error(r#"{a=x}"#, "at 3: expected a quoted string, found 'x'");
        check_error(r#"{a="x"} y"#, "at 8: expected the end, found 'y'");
        check_error(r#"{a="\q"}"#, r"at 4: unknown escape \q");
        check_error(r#"{a="x" b="y"}"#, "at 7: expected ',' or '}', found 'b'");
        check_error(r#"{a=~"a)|(b"}"#, "at 4: unopened group");
        check_error(r#"{a=~"("}"#, "at 4: unclosed group");
    }

    #[test]
    fn an_exploding_regular_expression_is_refused() {
        let error = Selector::parse(r#"{a=~"(a{1000}){1000}"}"#).expect_err("too large");
        assert!(matches!(error, SelectorError::Regex { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in any::<String>()) {
            let _ = Selector::parse(&text);
        }

        #[test]
        fn no_text_of_selector_characters_makes_the_parser_panic(text in r#"[{}a-b="'`~!,\\ é(|]{0,24}"#) {
            let _ = Selector::parse(&text);
        }

        #[test]
        fn a_quoted_value_is_read_back_as_written(value in any::<String>()) {
            let quoted = value.replace('\\', r"\\").replace('"', r#"\""#);
            let selector = Selector::parse(&format!("{{a=\"{quoted}\"}}"));
            if let Ok(selector) = selector {
                prop_assert!(selector.matchers.iter().all(|m| m.accepts(&value)));
            } else {
                prop_assert!(quoted.len() + 6 > SELECTOR_BYTES_MAX);
            }
        }
    }
}
