//! Bearer tokens: read from files that nobody else may read, compared without telling how much was right.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha2::{Digest as _, Sha256};

/// A token that can be guessed is none.
const TOKEN_CHARS_MIN: usize = 16;
const TOKEN_BYTES_MAX: u64 = 4 << 10;
/// What the group may not do with the file: write. What others may not: anything. Kubernetes gives secrets to a group.
const FORBIDDEN_MODE: u32 = 0o027;

/// A bearer token and the file it was read from. Its text is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    text: String,
    file: PathBuf,
}

/// Why a file gives no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// Not a regular file.
    #[error("not a regular file")]
    NotRegular,
    /// Another user than root and the own one could change it.
    #[error("it belongs to user {0}")]
    ForeignOwner(u32),
    /// Others could read it, or others or its group write it.
    #[error("its mode is {0:o}: others may read it or the group write it (chmod 600)")]
    Mode(u32),
    /// Larger than 4 KiB.
    #[error("{0} bytes")]
    Size(u64),
    /// Not one token of 16 or more visible ASCII characters.
    #[error("no such token in it")]
    NoToken,
}

impl Token {
    /// What is accepted, for messages.
    pub const ACCEPTED: &'static str =
        "a file of mode 600 (640 for its group) with one token of 16 or more visible characters";

    /// Reads the token of a file.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn read(file: &Path) -> Result<Self, TokenError> {
        let opened = fs::File::options().read(true).custom_flags(NONBLOCK).open(file)?;
        let metadata = opened.metadata()?;
        if !metadata.is_file() {
            return Err(TokenError::NotRegular);
        }
        let owner = metadata.uid();
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(TokenError::ForeignOwner(owner));
        }
        let mode = metadata.mode() & 0o777;
        if mode & FORBIDDEN_MODE != 0 {
            return Err(TokenError::Mode(mode));
        }
        if metadata.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Size(metadata.len()));
        }
        let mut text = String::new();
        opened.take(TOKEN_BYTES_MAX).read_to_string(&mut text)?;
        let text = text.trim().to_owned();
        if text.len() < TOKEN_CHARS_MIN || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::NoToken);
        }
        Ok(Self { text, file: file.to_owned() })
    }

    /// For a request's `Authorization: Bearer`.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The file it was read from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Whether the value of a request's `Authorization` header brings this token: `Bearer TOKEN`, or `Basic` with the
    /// token as password of any user, which browsers ask for and `http://user:TOKEN@HOST/` sends.
    #[must_use]
    pub fn is_in(&self, authorization: &str) -> bool {
        let (scheme, value) = authorization.split_once(' ').unwrap_or_default();
        let value = value.trim();
        let brought = match scheme {
            _ if scheme.eq_ignore_ascii_case("bearer") => Some(value.as_bytes().to_vec()),
            _ if scheme.eq_ignore_ascii_case("basic") => password(value),
            _ => None,
        };
        brought.is_some_and(|brought| are_equal(&brought, self.text.as_bytes()))
    }
}

/// A FIFO in the place of the file must not keep whoever opens it.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

/// Source: RFC 7617 §2: base64 of `user-id:password`, no colon in the first.
fn password(credentials: &str) -> Option<Vec<u8>> {
    let decoded = STANDARD.decode(credentials).ok()?;
    let colon = decoded.iter().position(|&byte| byte == b':')?;
    decoded.get(colon + 1..).map(<[u8]>::to_vec)
}

/// Takes the same time whatever differs and wherever: digests of equal length are compared to their end.
fn are_equal(one: &[u8], other: &[u8]) -> bool {
    let (one, other) = (Sha256::digest(one), Sha256::digest(other));
    let difference = one.iter().zip(other.iter()).fold(0, |sum, (one, other)| sum | (one ^ other));
    std::hint::black_box(difference) == 0
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.file.display())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const TEXT: &str = "0123456789abcdef";

    #[track_caller]
    fn check(content: &str, mode: u32, expect: Result<&str, &str>) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("token");
        fs::write(&file, content).expect("write");
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("set the mode");
        let found = Token::read(&file).map(|token| token.text).map_err(|error| error.to_string());
        match expect {
            Ok(text) => assert_eq!(found.as_deref(), Ok(text)),
            Err(part) => assert!(found.as_ref().is_err_and(|error| error.contains(part)), "{found:?}"),
        }
    }

    #[test]
    fn a_token_is_one_word_in_a_file_that_others_may_not_read() {
        for mode in [0o600, 0o400, 0o640, 0o440] {
            check(&format!("{TEXT}\n"), mode, Ok(TEXT));
        }
        for mode in [0o644, 0o604, 0o660, 0o620, 0o602, 0o601] {
            check(TEXT, mode, Err(&format!("mode is {mode:o}")));
        }
        check("0123456789abcde", 0o600, Err("no such token"));
        check("0123456789 abcdef", 0o600, Err("no such token"));
        check("0123456789abcdeé", 0o600, Err("no such token"));
        check(&"x".repeat(5000), 0o600, Err("5000 bytes"));
        assert!(matches!(Token::read(Path::new("/nowhere")), Err(TokenError::Read(_))));
        assert!(matches!(Token::read(Path::new("/dev/null")), Err(TokenError::NotRegular)));
    }

    #[test]
    fn the_token_is_brought_as_bearer_or_as_the_password_of_anybody() {
        let token = Token { text: TEXT.to_owned(), file: "f".into() };
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let good = [
            format!("Bearer {TEXT}"),
            format!("bearer  {TEXT}"),
            basic(&format!("any:{TEXT}")),
            basic(&format!(":{TEXT}")),
        ];
        for header in good {
            assert!(token.is_in(&header), "{header}");
        }
        let long = format!("Bearer {TEXT}x");
        let bad = [
            "",
            TEXT,
            "Bearer",
            "Bearer ",
            "Bearer 0123456789abcdeF",
            &long,
            "Basic !",
            &basic(TEXT),
            "Digest x",
        ];
        for header in bad {
            assert!(!token.is_in(header), "{header}");
        }
        assert!(!format!("{token:?}").contains(TEXT));
    }
}
