import { defineConfig } from "vite";

// Fixed file names, because the backend embeds these files by name, and no inline code, because its
// Content-Security-Policy forbids it.
export default defineConfig({
  base: "./",
  build: {
    target: "es2022",
    modulePreload: false,
    cssCodeSplit: false,
    assetsInlineLimit: 0,
    rollupOptions: {
      output: { entryFileNames: "app.js", assetFileNames: "app[extname]" },
    },
  },
});
